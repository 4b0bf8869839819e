"""Neighborhood attention on CUDA: every kernel against the float64 definition."""

from __future__ import annotations

import functools
import logging
import os
import random
from typing import Any

import pytest
import torch
from compare import assert_accurate
from gna_cases import (
    PER_HEAD,
    Case,
    biased_per_head,
    gradient_scale,
    names_of,
    per_head_inputs,
    run_head_by_head,
    run_per_head,
    run_with_grads,
)
from nearfield import neighborhood_attention
from nearfield.gna import op
from nearfield.gna.reference import neighborhood_attention_reference
from torch import Tensor

pytestmark = pytest.mark.gpu

DTYPES = {
    "hopper": [torch.bfloat16, torch.float16],
    "portable": [torch.bfloat16, torch.float16, torch.float32],
}
BACKENDS = list(DTYPES)
by_backend = pytest.mark.parametrize("backend", BACKENDS)


def cuda_inputs(case: Case, dtype: torch.dtype) -> list[Tensor]:
    return [t.detach().cuda().requires_grad_() for t in case.inputs(dtype)]


def check(case: Case, dtype: torch.dtype, backend: str, inputs: list[Tensor] | None = None) -> None:
    inputs = cuda_inputs(case, dtype) if inputs is None else inputs
    wide = [t.detach().double().requires_grad_() for t in inputs]
    dout = torch.randn(*inputs[0].shape[:-1], case.dim_v, device="cuda").to(dtype)
    dlse = torch.randn(inputs[0].shape[:-1], device="cuda").to(dtype)
    got = run_with_grads(functools.partial(case.run, backend=backend), inputs, [dout, dlse])
    truth = run_with_grads(case.reference, wide, [dout, dlse])
    eager = run_with_grads(case.reference, inputs, [dout, dlse])
    for name, g, t, e in zip(names_of(case), got, truth, eager, strict=True):
        allowed = {"scale": gradient_scale(name, case, wide, t, truth[1], dout)}
        if name == "lse":
            # A float32 result of exact inputs: hold it to the error of float32 arithmetic. The logarithm makes an
            # absolute error of the sum's relative one, and that is a few units of ex2.approx.
            e = case.reference([i.detach().float() for i in inputs])[1]
            allowed = {"factor": 8.0, "scale": 8.0}
        assert_accurate(f"{name} of {case} in {dtype}, {backend}", g, t, e, **allowed)


CASES = [
    Case((1,), (1,), dim=64, label="one-token"),
    Case((129,), (7,), dim=32, heads=3, batch=2),
    Case((1000,), (300,), dim=128),
    Case((1000,), (301,), (13,), causal=(True,), dim=128, heads=2),
    Case((640,), (256,), (128,), dim=64, label="strided"),
    Case((777,), (33,), (5,), (7,), (True,), dim=64, heads=4, heads_kv=2),
    Case((511,), (11,), (2,), (23,), dim=64, label="dilation-beyond-the-engine"),
    Case((33, 47), (7, 9), dim=64, heads=4, heads_kv=1, batch=2, label="gqa"),
    Case((40, 40), (40, 40), dim=128, label="dense"),
    Case((1000,), (300,), dim=64, heads=8, batch=4, label="more-tiles-than-ctas-64"),
    Case((30, 31), (17, 16), dim=256, heads=8, batch=3, label="more-tiles-than-ctas-256"),
    Case((32, 32), (13, 13), (1, 2), (2, 1), dim=32),
    Case((29, 31), (5, 4), (2, 3), (3, 5), (False, True), dim=256, heads=1),
    Case((31, 30), (6, 5), (1, 1), (5, 6), dim=96, dim_v=40, heads=2, batch=2, label="odd-head-dims"),
    Case((56, 56), (7, 7), dim=32, heads=4, batch=2, label="nat"),
    Case((12, 17, 15), (5, 7, 9), dim=128, heads=2),
    Case((12, 17, 15), (12, 7, 9), (1, 4, 3), causal=(True, False, False), dim=128, heads=2, label="video"),
    Case((10, 12, 14), (10, 12, 14), causal=(True, False, False), dim=64, heads=1, label="frame-causal"),
    Case((9, 11, 13), (3, 3, 4), (2, 1, 2), (2, 3, 1), (True, False, True), dim=64, heads=2, heads_kv=1, batch=2),
    Case((8, 10, 12), (4, 5, 6), dim=80, dim_v=72, heads=2, batch=3, label="batch-by-batch"),
    Case((1, 24, 30), (1, 9, 5), dim=128, heads=2, label="single-frame"),
    Case((18, 10, 16), (10, 4, 5), (3, 1, 2), dim=128, heads=2, label="first-dimension-covered"),
    Case((10, 20, 15), (3, 11, 4), (1, 2, 1), (1, 1, 2), (True, False, False), dim=64, label="middle-dimension-covered"),
    Case((30, 30), (9, 9), additional=77, dim=128, heads=4, heads_kv=2, label="additional"),
    Case((31, 29), (5, 6), (1, 2), (3, 4), additional=130, dim=64, heads=2, label="additional-dilated"),
    Case((11, 12, 13), (3, 5, 5), additional=70, dim=72, heads=2, batch=2, label="additional-batch-by-batch"),
    Case((257,), (9,), dilation=(5,), additional=9, dim=128, heads=2, label="additional-per-group"),
    Case((300,), (64,), additional=256, dim=64, heads=2, batch=2, label="additional-whole-tiles"),
    Case((500,), (200,), (3,), causal=(True,), dim=256, heads=4, heads_kv=2, batch=2, label="256-gqa"),
    Case((20, 20), (20, 20), dim=256, heads=1, label="256-dense"),
    Case((30, 31), (9, 8), additional=77, dim=192, dim_v=256, heads=2, label="192-additional"),
    Case((9, 10, 12), (5, 5, 6), (1, 2, 3), dim=136, dim_v=248, heads=2, batch=2, label="136-batch-by-batch"),
    Case((300,), (65,), (3,), dim=128, heads=2, periodic=(True,), label="circle"),
    Case((24, 28), (5, 6), (2, 1), (3, 1), dim=64, heads=4, heads_kv=2, periodic=(True, False), label="cylinder"),
    Case((9, 12, 10), (9, 5, 4), (1, 2, 3), causal=(True, False, False), dim=64, additional=9,
         periodic=(False, True, True), label="torus-video"),
    Case((20, 22), (5, 5), scale=-0.7, dim=64, label="negative-scale"),
    Case((20, 22), (5, 5), scale=0.0, dim=64, label="scale-0"),
    # Tiles with many visits, and more tiles than multiprocessors: dQ of the first heads is rounded beside the others.
    Case((33, 31), (25, 28), dim=128, heads=8, heads_kv=4, batch=6, label="many-visits-gqa"),
    Case((45, 43), (40, 43), dim=64, heads=12, label="many-visits-64"),
    Case((31, 33), (29, 30), causal=(True, False), dim=32, heads=8, batch=4, label="many-visits-32"),
    Case((30, 32), (27, 30), dim=256, heads=6, heads_kv=2, batch=5, label="many-visits-256"),
    Case((10, 12, 14), (10, 11, 13), causal=(True, False, False), dim=128, heads=16, label="many-visits-3d"),
]  # fmt: skip


BIAS_CASES = [
    Case((1,), (1,), dim=64, biased=True, label="one-token"),
    Case((1000,), (300,), dim=128, batch=2, biased=True),
    Case((777,), (33,), (5,), (7,), (True,), dim=64, heads=4, heads_kv=2, biased=True),
    Case((33, 47), (7, 9), dim=64, heads=4, heads_kv=1, batch=2, biased=True, label="gqa"),
    Case((56, 56), (7, 7), dim=32, heads=4, batch=2, biased=True, label="nat"),
    Case((29, 31), (5, 4), (2, 3), (3, 5), (False, True), dim=256, heads=1, biased=True),
    Case((40, 40), (40, 40), dim=128, biased=True, label="dense"),
    Case((12, 17, 15), (12, 7, 9), (1, 4, 3), causal=(True, False, False), dim=128, biased=True, label="video"),
    Case((9, 11, 13), (3, 3, 4), (2, 1, 2), (2, 3, 1), dim=60, dim_v=33, heads_kv=1, batch=2, biased=True),
    Case((31, 29), (5, 6), (1, 2), (3, 4), additional=130, dim=64, biased=True, label="additional-dilated"),
    Case((20, 22), (5, 5), scale=-0.7, dim=64, biased=True, label="negative-scale"),
    Case((20, 22), (5, 5), scale=0.0, dim=64, biased=True, label="scale-0"),
    Case((24, 20), (5, 4), (1, 3), (3, 4), additional=5, dim=64, biased=True, periodic=(True, True), label="torus"),
    Case((511,), (11,), (2,), (23,), dim=64, biased=True, label="dilation-beyond-the-engine"),
    Case((300,), (65,), additional=130, dim=128, heads=4, heads_kv=2, batch=2, biased=True, label="additional"),
    Case((8, 10, 12), (4, 5, 6), dim=80, dim_v=72, batch=3, biased=True, label="batch-by-batch"),
    Case((60, 3), (50, 1), dim=256, heads=3, biased=True, label="narrow"),
    Case((2048,), (1500,), (7,), causal=(True,), dim=64, biased=True, label="large-table"),
    Case((9, 10, 12), (5, 5, 6), (1, 2, 3), dim=136, dim_v=248, batch=2, biased=True, label="136-batch-by-batch"),
    Case((70, 90), (13, 22), (3, 4), dim=64, heads=3, biased=True, label="strides-beside-the-boxes"),
    Case((3, 33, 40), (2, 9, 11), (1, 1, 5), (1, 2, 1), (True, False, False), dim=128, batch=2, biased=True),
]  # fmt: skip


# What only the portable kernels take: rows that do not begin on 16 bytes.
ODD_CASES = [
    Case((40,), (9,), dim=1, heads=3, label="one-feature"),
    Case((31, 33), (7, 5), (1, 2), (2, 3), dim=60, dim_v=33, heads=4, heads_kv=2, batch=2, label="odd"),
    Case((9, 10, 11), (3, 4, 5), causal=(True, False, False), additional=37, dim=7, dim_v=130, label="odd-video"),
    Case((300,), (77,), additional=5, dim=250, dim_v=254, heads=2, label="odd-large"),
]  # fmt: skip


def case_id(value: object) -> str:
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend, dtype", [(b, d) for b in BACKENDS for d in DTYPES[b]], ids=case_id)
def test_values_and_gradients(case: Case, backend: str, dtype: torch.dtype) -> None:
    check(case, dtype, backend)


@pytest.mark.parametrize("case", ODD_CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES["portable"], ids=case_id)
def test_odd_head_dims(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, "portable")


def check_same_bits(case: Case, backend: str, inputs: list[Tensor], *, repeats: int) -> None:
    grad = torch.randn(*inputs[0].shape[:-1], case.dim_v, device="cuda", dtype=inputs[0].dtype)
    first = torch.autograd.grad(case.run(inputs, backend)[0], inputs, grad)
    for _ in range(repeats):
        again = torch.autograd.grad(case.run(inputs, backend)[0], inputs, grad)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("case", BIAS_CASES, ids=str)
@pytest.mark.parametrize("backend, dtype", [(b, d) for b in BACKENDS for d in DTYPES[b]], ids=case_id)
def test_bias(case: Case, backend: str, dtype: torch.dtype) -> None:
    """Right, and in deterministic mode, which the portable path always is, right with the same bits every time."""
    if backend == "hopper" and case.dim % 8 != 0:
        pytest.skip("the copy engine takes whole 16 bytes")
    inputs = cuda_inputs(case, dtype)
    check(case, dtype, backend, inputs)
    torch.use_deterministic_algorithms(backend == "hopper")
    try:
        if backend == "hopper":
            check(case, dtype, backend, inputs)
        check_same_bits(case, backend, inputs, repeats=3)
    finally:
        torch.use_deterministic_algorithms(False)


@by_backend
def test_frozen_bias_costs_no_gradient(backend: str) -> None:
    case = Case((40, 50), (7, 9), dim=64, biased=True)
    *inputs, bias = cuda_inputs(case, torch.bfloat16)

    def kernels(bias: Tensor) -> list[str]:
        out = case.run([*inputs, bias], backend)[0]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            out.sum().backward()
            torch.cuda.synchronize()
        return [event.name for event in profile.events() if "dbias" in event.name]

    assert len(kernels(bias)) == 1
    assert kernels(bias.detach()) == []


@pytest.mark.parametrize("case", CASES, ids=str)
@by_backend
def test_deterministic_mode(case: Case, backend: str) -> None:
    """Right as well, and the same bits every time. On Hopper dQ comes from another kernel then."""
    torch.use_deterministic_algorithms(True)
    try:
        inputs = cuda_inputs(case, torch.bfloat16)
        check(case, torch.bfloat16, backend, inputs)
        check_same_bits(case, backend, inputs, repeats=4)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize("problem", PER_HEAD, ids=str)
def test_windows_per_head(problem: tuple[Any, ...], dim: int, deterministic: bool) -> None:
    torch.use_deterministic_algorithms(deterministic)
    try:
        cpu = per_head_inputs(problem, 70, torch.bfloat16, dim)
        inputs = [t.detach().cuda().requires_grad_() for t in cpu]
        wide = [t.detach().double().requires_grad_() for t in inputs]
        grads = [torch.randn_like(t).bfloat16() for t in run_per_head(problem, inputs)]
        got = run_with_grads(lambda t: run_per_head(problem, t), inputs, grads)
        truth = run_with_grads(lambda t: run_head_by_head(problem, t), wide, grads)
        eager = run_with_grads(lambda t: run_head_by_head(problem, t), inputs, grads)
    finally:
        torch.use_deterministic_algorithms(False)
    single = run_head_by_head(problem, [t.detach().float() for t in inputs])[1]
    for i, (g, t, e) in enumerate(zip(got, truth, eager, strict=True)):
        extra = {"factor": 8.0, "scale": 8.0} if i == 1 else {}  # lse: see check()
        assert_accurate(f"result {i} of {problem}", g, t, single if i == 1 else e, **extra)


@pytest.mark.parametrize("dtype", DTYPES["portable"], ids=case_id)
def test_bias_with_windows_per_head(dtype: torch.dtype) -> None:
    """In 16 bits by Hopper's kernels, where there are any."""
    case = Case((32, 33), (5, 4), heads=4, batch=2, dim=64, biased=True)
    inputs = cuda_inputs(case, dtype)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    grads = [torch.randn_like(t).to(dtype) for t in biased_per_head(inputs)]
    reference = functools.partial(biased_per_head, attend=neighborhood_attention_reference)
    got, truth, eager = (
        run_with_grads(f, t, grads)
        for f, t in ((biased_per_head, inputs), (reference, wide), (reference, inputs))
    )
    eager[1] = reference([t.detach().float() for t in inputs])[1]
    for name, g, t, e in zip(names_of(case), got, truth, eager, strict=True):
        allowed = {"scale": gradient_scale(name, case, wide, t, truth[1], grads[0])}
        if name == "lse":
            allowed = {"factor": 8.0, "scale": 8.0}  # see check()
        assert_accurate(f"{name} in {dtype}", g, t, e, **allowed)


def random_case(rng: random.Random, rank: int, backend: str) -> Case:
    size, window, stride, dilation, causal = [], [], [], [], []
    largest = {1: 900, 2: 34, 3: 11}[rank]
    for _ in range(rank):
        x = rng.randint(1, largest)
        d = rng.choice([1, 1, 1, 2, 3, rng.randint(1, x)])
        d = min(d, x)
        w = rng.choice([rng.randint(1, x // d), x // d])
        size.append(x)
        dilation.append(d)
        window.append(w)
        stride.append(rng.choice([1, w, rng.randint(1, w)]))
        causal.append(rng.random() < 0.3)
    heads_kv = rng.choice([1, 2])
    unit = 8 if backend == "hopper" else rng.choice([1, 8])
    any_dim = unit * rng.randint(1, 256 // unit)
    dim = rng.choice([32, 64, 128, 128, 256, any_dim])
    return Case(
        tuple(size), tuple(window), tuple(stride), tuple(dilation), tuple(causal),
        batch=rng.choice([1, 1, 2]), heads=heads_kv * rng.choice([1, 2, 3]), heads_kv=heads_kv,
        dim=dim, dim_v=rng.choice([dim, dim, unit * rng.randint(1, 256 // unit)]),
        additional=rng.choice([0, 0, 0, 1, rng.randint(1, 200)]),
        biased=rng.random() < 0.3,
        periodic=tuple(
            not c and x % d == 0 and rng.random() < 0.3 for x, d, c in zip(size, dilation, causal, strict=True)
        ),
    )  # fmt: skip


# Problems per rank and backend: 40 take seconds; NEARFIELD_SWEEP=500 is the whole sweep, in parts for pytest -n.
SWEEP, SWEEP_PARTS = int(os.environ.get("NEARFIELD_SWEEP", "40")), 8


@pytest.mark.parametrize("part", range(SWEEP_PARTS))
@pytest.mark.parametrize("rank", [1, 2, 3])
@by_backend
def test_random_problems(rank: int, backend: str, part: int) -> None:
    for i in range(part, SWEEP, SWEEP_PARTS):
        rng = random.Random(f"{rank}, {backend}, {i}")
        case = random_case(rng, rank, backend)
        torch.use_deterministic_algorithms(rng.random() < 0.3)
        try:
            check(case, rng.choice(DTYPES[backend]), backend)
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", ["large-scores", "constant", "one-hot"])
@pytest.mark.parametrize("backend, dtype", [(b, d) for b in BACKENDS for d in DTYPES[b]], ids=case_id)
def test_hostile_inputs(kind: str, backend: str, dtype: torch.dtype) -> None:
    case = Case((30, 40), (7, 9), dim=64, additional=5)
    inputs = cuda_inputs(case, dtype)
    with torch.no_grad():
        if kind == "large-scores":
            for t in inputs[:2]:
                t.mul_(30)
        elif kind == "constant":
            for t in inputs:
                t.fill_(1.5)
        elif kind == "one-hot":
            inputs[0].zero_()
            inputs[0][..., 0] = 1000
    check(case, dtype, backend, inputs)


@by_backend
def test_unseen_nan_stays_unseen(backend: str) -> None:
    """NaN in a key that no query of a tile sees. In a value it may spread inside a box, as the README says."""
    case = Case((64, 64), (5, 5), dim=64)
    q, k, v = (t.detach() for t in cuda_inputs(case, torch.bfloat16))
    want = case.run([q, k, v], backend)[0]
    k[:, :8, :8] = float("nan")
    got = case.run([q, k, v], backend)[0]
    assert torch.equal(got[:, 10:], want[:, 10:])
    assert torch.equal(got[:, :, 10:], want[:, :, 10:])


@by_backend
def test_views_of_a_packed_projection(backend: str) -> None:
    case = Case((24, 26), (7, 7), dim=64, heads=3)
    attend = functools.partial(neighborhood_attention, backend=backend)
    packed = torch.randn(2, 24, 26, 3, 3, 64, device="cuda", dtype=torch.bfloat16)
    for views in (packed.unbind(3), packed.unbind(4)):
        q, k, v = views
        got = attend(q, k, v, case.window)
        want = attend(q.contiguous(), k.contiguous(), v.contiguous(), case.window)
        assert torch.equal(got, want)
    heads_first = torch.randn(2, 3, 24, 26, 64, device="cuda", dtype=torch.bfloat16).permute(0, 2, 3, 1, 4)
    got = attend(heads_first, heads_first, heads_first, case.window)
    same = heads_first.contiguous()
    assert torch.equal(got, attend(same, same, same, case.window))
    shifted = torch.randn(2 * 24 * 26 * 3 * 64 + 1, device="cuda", dtype=torch.bfloat16)[1:].view(
        2, 24, 26, 3, 64
    )
    same = shifted.clone()
    assert torch.equal(attend(shifted, shifted, shifted, case.window), attend(same, same, same, case.window))
    spread = torch.randn(2, 24, 26, 3, 128, device="cuda", dtype=torch.bfloat16)[..., ::2]
    same = spread.contiguous()
    assert torch.equal(attend(spread, spread, spread, case.window), attend(same, same, same, case.window))


@by_backend
def test_offsets_beyond_32_bits(backend: str) -> None:
    x, heads, dim = 1040, 8, 256
    q = torch.randn(1, x, x, heads, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    assert q.numel() > 2**31
    out = neighborhood_attention(q, q, q, 5, backend=backend)
    (dq,) = torch.autograd.grad(out, q, torch.ones((), device="cuda", dtype=q.dtype).expand(out.shape))
    corner = q.detach()[:, -16:, -16:, -1:].cpu()

    def on_cpu(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = corner.to(dtype, copy=True).requires_grad_()
        result = neighborhood_attention(leaf, leaf, leaf, 5)
        return result, torch.autograd.grad(result, leaf, torch.ones_like(result))[0]

    truth, eager = on_cpu(torch.float64), on_cpu(torch.bfloat16)
    # Windows of the last 8, and the queries that see the last 4, lie inside the corner.
    assert_accurate("out", out[:, -8:, -8:, -1:], truth[0][:, -8:, -8:], eager[0][:, -8:, -8:])
    assert_accurate("gradient", dq[:, -4:, -4:, -1:], truth[1][:, -4:, -4:], eager[1][:, -4:, -4:])


@by_backend
def test_side_stream_and_graph(backend: str) -> None:
    attend = functools.partial(neighborhood_attention, backend=backend)
    q, k, v = (torch.randn(1, 64, 64, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    want = attend(q, k, v, 13)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        got = attend(q, k, v, 13)
        assert not stream.query(), "the launch waited for the stream"
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(q, k, v, 13)
    for _ in range(3):
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, want)


@pytest.mark.parametrize("dim", [64, 128, 256])
@by_backend
def test_bitwise_repeatable(backend: str, dim: int) -> None:
    """Many tiles per multiprocessor, 200 times: a warp that stages its rows over what another still reads shows here."""
    case = Case((20, 24, 18), (7, 9, 5), dim=dim, heads=6, batch=1)
    inputs = cuda_inputs(case, torch.bfloat16)
    grad = torch.randn(*inputs[0].shape[:-1], dim, device="cuda", dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:

        def everything() -> list[Tensor]:
            out, lse = case.run(inputs, backend)
            return [out, lse, *torch.autograd.grad(out, inputs, grad)]

        first = everything()
        for _ in range(200):
            assert all(torch.equal(a, b) for a, b in zip(first, everything(), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@by_backend
def test_compile_and_opcheck(backend: str) -> None:
    case = Case((30, 31), (7, 8), dim=64, heads=2, additional=9)
    inputs = cuda_inputs(case, torch.bfloat16)

    def f(*tensors: Tensor) -> Any:
        return case.run(list(tensors), backend)[0]

    grad = torch.randn_like(f(*inputs))
    want = [f(*inputs), *torch.autograd.grad(f(*inputs), inputs, grad)]
    compiled = torch.compile(f, fullgraph=True)
    got = [compiled(*inputs), *torch.autograd.grad(compiled(*inputs), inputs, grad)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
    torch.library.opcheck(
        torch.ops.nearfield.gna_fwd.default,
        (*inputs, [7, 8], [1, 1], [1, 1], [0, 0], 0.125, backend),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        atol=1e-2, rtol=1e-2,
    )  # fmt: skip


@pytest.mark.parametrize(
    "dtype, dim, backend, words",
    [
        (torch.float64, 64, None, "Double; supported on CUDA: bfloat16, float16, float32"),
        (torch.bfloat16, 264, None, "head dims 264 .* supported on CUDA: up to 256"),
        (torch.float64, 64, "portable", "supported on CUDA: bfloat16, float16, float32"),
        (torch.float32, 64, "hopper", "hopper.* was asked for, but q has dtype Float"),
        (torch.bfloat16, 60, "hopper", "hopper.* was asked for, but the head dims are 60 .* multiples of 8"),
    ],
)
def test_what_is_not_built_is_refused(dtype: torch.dtype, dim: int, backend: str | None, words: str) -> None:
    q = torch.randn(1, 9, 9, 1, dim, device="cuda", dtype=dtype)
    with pytest.raises(RuntimeError, match=words):
        neighborhood_attention(q, q, q, 3, backend=backend)


def test_choice_of_the_backend(caplog: pytest.LogCaptureFixture) -> None:
    """None is Hopper's path where it serves, with the same bits; else the portable one, with one warning."""
    op._warn_once_if_slower.cache_clear()
    q = torch.randn(1, 30, 31, 2, 64, device="cuda", dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING, "nearfield"):
        chosen, hopper = (neighborhood_attention(q, q, q, 7, backend=b) for b in (None, "hopper"))
        assert torch.equal(chosen, hopper)
        assert not caplog.records
        for _ in range(3):
            neighborhood_attention(q.float(), q.float(), q.float(), 7)
        assert len(caplog.records) == 1
        assert "q has dtype Float" in caplog.text
        assert "the portable kernels run instead" in caplog.text
        neighborhood_attention(q.float(), q.float(), q.float(), 7, backend="portable")
        assert len(caplog.records) == 1, "what was asked for needs no warning"
        neighborhood_attention(q, q, q, 7, bias=torch.randn(2, 13, 13, device="cuda"))
        assert len(caplog.records) == 1, "Hopper's kernels take a bias"
