"""Operators split over processes, 2 and 4 on a CPU (gloo) or 2 GPUs (NCCL), give what a single process gives."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import nearfield
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from compare import assert_accurate
from hypothesis import given
from hypothesis import strategies as st
from nearfield import distributed
from nearfield.distributed.neighborhood import needed_rows
from nearfield.distributed.rows import _concerned, owned_ranges
from nearfield.gna.reference import visible_keys
from torch import Tensor

NEED_TWO_GPUS = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
Results = list[dict[str, Any]]  # by process
Split = dict[int, tuple[int, ...]]

# The grid, the dimension that is split, the slabs of 2 and of 4 processes, the options.
GRIDS: dict[str, tuple[tuple[int, ...], int, Split, dict[str, Any]]] = {
    "1d": ((24,), 0, {2: (12, 12), 4: (6, 6, 6, 6)}, {"kernel_size": 7}),
    "1d-uneven": ((23,), 0, {2: (5, 18), 4: (9, 1, 2, 11)}, {"kernel_size": 8}),
    "1d-causal": ((24,), 0, {2: (7, 17), 4: (3, 8, 7, 6)}, {"kernel_size": 9, "is_causal": True}),
    "1d-strided": ((23,), 0, {2: (10, 13), 4: (4, 7, 5, 7)}, {"kernel_size": 6, "stride": 4}),
    "1d-causal-strided": ((23,), 0, {2: (10, 13), 4: (4, 7, 5, 7)}, {"kernel_size": 6, "stride": 5, "is_causal": True}),
    # The first and the last of 4 processes send and receive nothing.
    "1d-blocks": ((24,), 0, {2: (8, 16), 4: (4, 6, 6, 8)}, {"kernel_size": 4, "stride": 4}),
    "1d-dilated": ((29,), 0, {2: (14, 15), 4: (8, 2, 9, 10)}, {"kernel_size": 4, "dilation": 3, "stride": 2}),
    "1d-whole": ((12,), 0, {2: (5, 7), 4: (3, 3, 3, 3)}, {"kernel_size": -1, "scale": 0.3}),
    "2d-rows": ((12, 5), 0, {2: (6, 6), 4: (3, 4, 2, 3)}, {"kernel_size": (5, 3), "stride": (2, 1)}),
    "2d-columns": ((5, 12), 1, {2: (6, 6), 4: (3, 4, 2, 3)}, {"kernel_size": 3, "dilation": (1, 2)}),
    "3d-time": ((8, 4, 5), 0, {2: (4, 4), 4: (2, 2, 2, 2)}, {"kernel_size": (5, 3, 3), "is_causal": (True, False, False)}),
}  # fmt: skip
SPANS: Split = {2: (9, 14), 4: (7, 1, 10, 5)}
CHAINS: dict[str, dict[str, Any]] = {
    "deltanet": {},
    "gdn": {"gated": True, "state": True},
    "kda": {"gated": True, "channel": True},
    "gdn-fused": {"gated": True, "fused": True, "state": True, "state_v_first": True},
    "kda-bounded": {"gated": True, "channel": True, "fused": True, "gate": "bounded"},
}


def grid_inputs(size: tuple[int, ...]) -> list[Tensor]:
    """q, k, v, additional keys and values, and weights for out and lse."""
    torch.manual_seed(0)
    shapes = [
        (2, *size, 4, 6),
        (2, *size, 2, 6),
        (2, *size, 2, 5),
        (2, 3, 2, 6),
        (2, 3, 2, 5),
        (2, *size, 4, 5),
        (2, *size, 4),
    ]
    return [torch.randn(s, dtype=torch.float64) for s in shapes]  # fmt: skip


def chain_inputs(
    case: dict[str, Any], gpu: int | None
) -> tuple[dict[str, Tensor], dict[str, Any], list[Tensor]]:
    """Tensors with gradient, options, and weights for o and the final state."""
    torch.manual_seed(0)
    B, T, H, HV, K, V = 2, 23, 2, 4, 6, 5
    tensors = {
        "q": torch.randn(B, T, H, K),
        "k": torch.randn(B, T, H, K),
        "v": torch.randn(B, T, HV, V),
        "beta": torch.randn(B, T, HV) if "fused" in case else torch.rand(B, T, HV),
    }
    shape = (B, T, HV, K) if "channel" in case else (B, T, HV)
    if "gated" in case:
        tensors["g"] = torch.randn(shape) if "fused" in case else -torch.rand(shape)
    options: dict[str, Any] = {"use_qk_l2norm": True, "output_final_state": True}
    if "fused" in case:
        tensors["A_log"], tensors["dt_bias"] = torch.randn(HV), torch.randn(shape[2:])
        options |= {"gate": case.get("gate", "softplus"), "beta_activation": "sigmoid2"}
    v_first = case.get("state_v_first", False)
    state = (B, HV, V, K) if v_first else (B, HV, K, V)
    if "state" in case:
        tensors["initial_state"] = torch.randn(state)
    options["state_v_first"] = v_first
    weights = [place(torch.randn(shape).double(), gpu) for shape in ((B, T, HV, V), state)]
    return {name: place(t.double(), gpu) for name, t in tensors.items()}, options, weights


# Where and how a process computes: exactly on the CPU, in float32 on its GPU.
def place(tensor: Tensor, gpu: int | None) -> Tensor:
    return tensor if gpu is None else tensor.to(f"cuda:{gpu}", torch.float32)


def run_grid(name: str, rank: int, world: int, ask: bool, gpu: int | None) -> dict[str, Tensor]:
    size, split_dim, split, options = GRIDS[name]
    axis = split_dim + 1
    q, k, v, add_k, add_v, w_out, w_lse = (place(t, gpu) for t in grid_inputs(size))
    q, k, v, w_out, w_lse = (t.split(split[world], axis)[rank] for t in (q, k, v, w_out, w_lse))
    leaves = [t.clone().requires_grad_() for t in (q, k, v, add_k, add_v)]
    out, lse = distributed.neighborhood_attention(
        *leaves[:3], split_dim=split_dim, sizes=None if ask else split[world], additional_keys=leaves[3],
        additional_values=leaves[4], return_lse=True, **options,
    )  # fmt: skip
    grads = torch.autograd.grad((out * w_out).sum() + (lse * w_lse).sum(), leaves)
    return {"out": out.detach(), "lse": lse.detach()} | dict(
        zip(("q", "k", "v", "add_k", "add_v"), grads, strict=True)
    )


def run_chain(name: str, rank: int, world: int, gpu: int | None) -> dict[str, Tensor]:
    tensors, options, (w_o, w_state) = chain_inputs(CHAINS[name], gpu)
    whole = ("A_log", "dt_bias", "initial_state")
    mine = {n: t if n in whole else t.split(SPANS[world], 1)[rank] for n, t in tensors.items()}
    if rank > 0:
        mine.pop("initial_state", None)
    leaves = {n: t.clone().requires_grad_() for n, t in mine.items()}
    o, state = distributed.delta_rule(**leaves, **options)
    assert state is not None
    loss = (o * w_o.split(SPANS[world], 1)[rank]).sum()
    if rank == world - 1:
        loss = loss + (state * w_state).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"o": o.detach(), "state": state.detach()} | dict(zip(leaves, grads, strict=True))


def convolution_inputs() -> list[Tensor]:
    """x, weight, and weights for the output."""
    torch.manual_seed(0)
    return [torch.randn(s, dtype=torch.float64) for s in ((2, 23, 3), (3, 1, 5), (2, 23, 3))]


def run_convolution(rank: int, world: int, gpu: int | None) -> dict[str, Tensor]:
    """A span of one token is shorter than what the next ones need."""
    x, weight, w_out = (place(t, gpu) for t in convolution_inputs())
    leaves = [x.split(SPANS[world], 1)[rank].clone().requires_grad_(), weight.requires_grad_()]
    y = distributed.short_convolution(*leaves)
    d_x, d_weight = torch.autograd.grad((y * w_out.split(SPANS[world], 1)[rank]).sum(), leaves)
    same = distributed.short_convolution(leaves[0].detach(), weight.detach(), sizes=SPANS[world])
    return {"y": y.detach(), "same": same, "x": d_x, "weight": d_weight}


def run_inner_state(rank: int, world: int, gpu: int | None) -> dict[str, Tensor]:
    """A loss on the state after every span, not only after the last."""
    tensors, options, _ = chain_inputs(CHAINS["gdn"], gpu)
    leaves = {
        n: t.split(SPANS[world], 1)[rank].clone().requires_grad_()
        for n, t in tensors.items()
        if n != "initial_state"
    }
    _, state = distributed.delta_rule(**leaves, **options)
    assert state is not None
    return dict(zip(leaves, torch.autograd.grad(state.square().sum(), list(leaves.values())), strict=True))


def run_errors(rank: int, world: int) -> dict[str, str]:
    x, said = torch.randn(1, 6, 2, 4), {}
    calls = {
        "split_dim": lambda: distributed.neighborhood_attention(x, x, x, 3, split_dim=1),
        "sizes": lambda: distributed.neighborhood_attention(x, x, x, 3, sizes=[6] * (world + 1)),
        "kernel_size": lambda: distributed.neighborhood_attention(x, x, x, 6 * world + 1, sizes=[6] * world),
        "shape": lambda: distributed.neighborhood_attention(x, x[:, :5], x, 3),
        "weight": lambda: distributed.short_convolution(x[..., 0], torch.zeros(3, 1, 4)),
        "spans": lambda: distributed.short_convolution(x[..., 0], torch.zeros(2, 1, 4), sizes=[5] * world),
    }
    if rank > 0:
        state = torch.zeros(1, 2, 4, 4)
        calls["state"] = lambda: distributed.delta_rule(x, x, x, x[..., 0], initial_state=state)
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            said[name] = str(error)
    return said


def work(rank: int, world: int, folder: Path, backend: str) -> None:
    """One process: runs every case and leaves its results, or what went wrong, in a file."""
    torch.set_num_threads(1)
    init = f"file://{folder / 'meeting'}"
    gpu = None
    if backend == "nccl":
        torch.cuda.set_device(gpu := rank)
    else:
        torch.use_deterministic_algorithms(True)  # poisons uninitialised memory
    dist.init_process_group(backend, init, timedelta(seconds=60), world, rank)
    results: dict[str, Any] = {}
    try:
        for name in GRIDS:
            results[name] = run_grid(name, rank, world, name == "1d-uneven", gpu)
        for name in CHAINS:
            results[name] = run_chain(name, rank, world, gpu)
        results["convolution"] = run_convolution(rank, world, gpu)
        results["inner"] = run_inner_state(rank, world, gpu)
        results["errors"] = run_errors(rank, world)
        half = [r for r in range(world) if r % 2 == rank % 2]  # the members of my group
        groups = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])] if world == 4 else []
        if groups:
            x = torch.arange(12.0).reshape(1, 6, 2, 1).double()
            part = x.split([2, 4], 1)[half.index(rank)]
            results["group"] = distributed.neighborhood_attention(part, part, part, 3, group=groups[rank % 2])
    except BaseException:
        results["failed"] = traceback.format_exc()
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(
    scope="module",
    params=[(2, "gloo"), (4, "gloo"), pytest.param((2, "nccl"), marks=NEED_TWO_GPUS)],
    ids=["2 processes", "4 processes", "2 GPUs"],
)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    (world, backend), folder = request.param, tmp_path_factory.mktemp("processes")
    mp.spawn(work, (world, folder, backend), nprocs=world)
    loaded = [
        torch.load(folder / f"{rank}.pt", weights_only=True, map_location="cpu") for rank in range(world)
    ]
    for rank, result in enumerate(loaded):
        assert "failed" not in result, f"process {rank}: {result['failed']}"
    return loaded


Whole = Callable[[int | None], dict[str, Tensor]]


class Expected:
    """What a single process computes: exactly, and in float32 on a GPU where the split results are of GPUs."""

    def __init__(self, results: Results, whole: Whole) -> None:
        self.truth = whole(None)
        on_gpus = results[0]["convolution"]["y"].dtype == torch.float32
        self.eager = {name: t.cpu() for name, t in whole(0).items()} if on_gpus else None

    def check(self, name: str, got: Tensor) -> None:
        truth = self.truth[name]
        if self.eager is None:
            torch.testing.assert_close(got, truth, rtol=0, atol=1e-10 * max(1.0, float(truth.abs().max())))
        else:  # the split sums in another order, and composes states
            assert_accurate(name, got, truth, self.eager[name], factor=4)


def whole_grid(name: str, gpu: int | None) -> dict[str, Tensor]:
    size, _, _, options = GRIDS[name]
    *leaves, w_out, w_lse = (place(t, gpu) for t in grid_inputs(size))
    leaves = [t.requires_grad_() for t in leaves]
    out, lse = nearfield.neighborhood_attention(
        *leaves[:3], **options, additional_keys=leaves[3], additional_values=leaves[4], return_lse=True
    )
    grads = torch.autograd.grad((out * w_out).sum() + (lse * w_lse).sum(), leaves)
    names = ("q", "k", "v", "add_k", "add_v")
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(names, grads, strict=True))}


@pytest.mark.parametrize("name", [*GRIDS])
def test_neighborhood_attention(results: Results, name: str) -> None:
    expected = Expected(results, partial(whole_grid, name))
    for what in ("out", "lse", "q", "k", "v"):
        expected.check(what, torch.cat([r[name][what] for r in results], GRIDS[name][1] + 1))
    for result in results:  # every process has the whole gradient of what all of them hold
        for what in ("add_k", "add_v"):
            expected.check(what, result[name][what])


def whole_convolution(gpu: int | None) -> dict[str, Tensor]:
    x, weight, w_out = (place(t, gpu) for t in convolution_inputs())
    layer = nearfield.nn.ShortConvolution(3, 5).to(x)
    layer.weight.data = weight
    y = layer(x.requires_grad_())
    d_x, d_weight = torch.autograd.grad((y * w_out).sum(), [x, layer.weight])
    return {"y": y.detach(), "same": y.detach(), "x": d_x, "weight": d_weight}


def test_short_convolution(results: Results) -> None:
    expected = Expected(results, whole_convolution)
    parts = [result["convolution"] for result in results]
    for what in ("y", "same", "x"):
        expected.check(what, torch.cat([part[what] for part in parts], 1))
    for part in parts:
        expected.check("weight", part["weight"])


def whole_chain(name: str, gpu: int | None) -> dict[str, Tensor]:
    tensors, options, (w_o, w_state) = chain_inputs(CHAINS[name], gpu)
    leaves = {n: t.requires_grad_() for n, t in tensors.items()}
    o, state = nearfield.delta_rule(**leaves, **options)
    assert state is not None
    grads = torch.autograd.grad((o * w_o).sum() + (state * w_state).sum(), list(leaves.values()))
    return {"o": o.detach(), "state": state.detach(), **dict(zip(leaves, grads, strict=True))}


@pytest.mark.parametrize("name", [*CHAINS])
def test_delta_rule(results: Results, name: str) -> None:
    expected = Expected(results, partial(whole_chain, name))
    for what in expected.truth:
        if what == "state":
            expected.check(what, results[-1][name][what])
        elif what == "initial_state":
            expected.check(what, results[0][name][what])
        elif what in ("A_log", "dt_bias"):
            for result in results:
                expected.check(what, result[name][what])
        else:
            expected.check(what, torch.cat([r[name][what] for r in results], 1))


def whole_inner_state(world: int, gpu: int | None) -> dict[str, Tensor]:
    tensors, options, _ = chain_inputs(CHAINS["gdn"], gpu)
    leaves = {n: t.requires_grad_() for n, t in tensors.items() if n != "initial_state"}
    losses, state = [], None
    for begin, end in owned_ranges(SPANS[world]):
        _, state = nearfield.delta_rule(
            **{n: t[:, begin:end] for n, t in leaves.items()}, initial_state=state, **options
        )
        assert state is not None
        losses.append(state.square().sum())
    return dict(
        zip(leaves, torch.autograd.grad(torch.stack(losses).sum(), list(leaves.values())), strict=True)
    )


def test_a_loss_on_inner_states(results: Results) -> None:
    expected = Expected(results, partial(whole_inner_state, len(results)))
    for what in expected.truth:
        expected.check(what, torch.cat([r["inner"][what] for r in results], 1))


def test_groups_are_respected(results: Results) -> None:
    if len(results) < 4:
        pytest.skip("needs two groups of two")
    x = torch.arange(12.0).reshape(1, 6, 2, 1).double()
    whole = nearfield.neighborhood_attention(x, x, x, 3)
    for pair in ((0, 2), (1, 3)):
        together = torch.cat([results[rank]["group"] for rank in pair], 1)
        torch.testing.assert_close(together, whole, rtol=0, atol=1e-10)


def test_bad_input_is_named(results: Results) -> None:
    for rank, result in enumerate(results):
        said = result["errors"]
        assert "split_dim is 1, expected 0 to 0" in said["split_dim"]
        assert f"expected {len(results)} of at least 1, of which number {rank} is 6" in said["sizes"]
        assert "exceeds the input size" in said["kernel_size"]
        assert "the same batch and spatial sizes" in said["shape"]
        assert "weight has shape [3, 1, 4], expected [2, 1, size]" in said["weight"]
        assert f"of which number {rank} is 6" in said["spans"]
        if rank > 0:
            assert f"initial_state is given on process {rank}, expected on process 0" in said["state"]


def test_who_is_concerned() -> None:
    owned = owned_ranges((4, 6, 6, 8))
    assert _concerned(owned, [(0, 4), (4, 12), (8, 16), (16, 24)]) == {1, 2}
    assert _concerned(owned, owned) == set()


@given(st.data())
def test_needed_rows_show_every_query_what_it_sees_in_the_whole(data: st.DataObject) -> None:
    window = data.draw(st.integers(1, 9), "window")
    stride = data.draw(st.integers(1, window), "stride")
    dilation = data.draw(st.integers(1, 4), "dilation")
    length = data.draw(st.integers(window * dilation, window * dilation + 40), "length")
    causal = data.draw(st.booleans(), "causal")
    cuts = data.draw(st.lists(st.integers(1, max(length - 1, 1)), max_size=4, unique=True), "cuts")
    bounds = [0, *sorted(c for c in cuts if c < length), length]
    for begin, end in pairwise(bounds):
        first, last = needed_rows((begin, end), length, window, stride, dilation, causal)
        assert 0 <= first <= begin < end <= last <= length
        for x in range(begin, end):
            inside = visible_keys(x - first, last - first, window, stride, dilation, causal)
            assert [first + y for y in inside] == visible_keys(x, length, window, stride, dilation, causal)
