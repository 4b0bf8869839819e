"""The delta rule on CUDA against float64 on the same rounded inputs: values, edge cases, the framework contract."""

from __future__ import annotations

import functools
import math
import re
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from delta_cases import (
    L2_16BIT,
    SEQUENCES,
    correlated_keys,
    hostile_gates,
    kernels,
    make,
    name_of,
    repeated_keys,
)
from delta_chunks import delta_rule_by_chunks
from nearfield.delta import delta_rule, delta_rule_states, delta_rule_transition
from torch import Tensor

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16]
GATE_KINDS = ("none", "head", "channel")


@pytest.fixture(autouse=True, params=["hopper", "portable"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs on both backends."""
    name: str = request.param
    for function in (delta_rule, delta_rule_states, delta_rule_transition):
        partial = functools.partial(function, backend=name)
        monkeypatch.setattr(sys.modules[__name__], function.__name__, partial)
    return name


def cuda(args: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() if isinstance(value, Tensor) else value for name, value in args.items()}


def double(args: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in args.items()
    }


def check(args: dict[str, Any], *, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """delta_rule(**args) within the family's tolerance of float64."""
    args = cuda(args)
    got = delta_rule(**args, output_final_state=True)
    truth = delta_rule_by_chunks(**double(args), output_final_state=True)
    o, state = got
    assert state is not None
    assert o.dtype == args["q"].dtype
    assert state.dtype == torch.float32
    for name, value, true in zip(("o", "final_state"), got, truth, strict=True):
        assert value is not None
        assert true is not None
        assert value.shape == true.shape
        assert value.isfinite().all(), f"{name} is not finite"
        error, norm = float((value.double() - true).norm()), float(true.norm())
        assert error <= factor * L2_16BIT[name] * norm, f"{name}: L2 error {error / norm:.3g} of the norm"
    return o, state


# ----------------------------------------------------------------------------------- shapes, lengths, options


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("gate", GATE_KINDS)
@pytest.mark.parametrize(
    "dims", [(128, 128), (64, 64), (64, 128), (128, 64), (72, 40), (40, 200), (8, 8), (128, 256)]
)
def test_head_dims(dims: tuple[int, int], gate: str, dtype: torch.dtype) -> None:
    # More tokens in a chunk than key channels: the keys are correlated.
    check(
        make(B=2, T=200, H=2, HV=2, K=dims[0], V=dims[1], gate=gate, dtype=dtype),
        factor=2 if dims[0] < 64 else 1,
    )


@pytest.mark.parametrize("gate", GATE_KINDS)
@pytest.mark.parametrize("T", [1, 15, 16, 17, 63, 64, 65, 127, 128, 1000])
def test_lengths(T: int, gate: str) -> None:
    for initial in (True, False):
        check(make(B=2, T=T, K=128, V=128, gate=gate, dtype=torch.bfloat16, initial=initial))


@pytest.mark.parametrize("gate", GATE_KINDS)
def test_many_heads(gate: str) -> None:
    """More chains than SMs."""
    check(make(B=3, T=200, H=32, HV=64, K=128, V=128, gate=gate, dtype=torch.bfloat16))


def test_long_sequence() -> None:
    check(make(B=1, T=20000, H=1, HV=2, K=128, V=128, strength=0.01, dtype=torch.bfloat16))


def walks_beside(args: dict[str, Any], backend: str) -> bool:
    """Whether a walk starts before the last chunk is prepared, in any of some calls.

    A busy host may launch it late, and a GPU that others use as well may run it late.
    """

    def once() -> bool:
        events = kernels(lambda: delta_rule(**cuda(args)))
        prepared = [event.time_range.end for event in events if "prepare" in event.name]
        walked = [event.time_range.start for event in events if re.search("state_pass|walk", event.name)]
        return min(walked) < max(prepared)

    return any(once() for _ in range(40 if backend == "hopper" else 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("gate", ["none", "head"])
@pytest.mark.parametrize("repeated", [slice(0), slice(1000), slice(290, 460)], ids=str)
def test_chunks_prepared_beside_the_walk(
    backend: str, repeated: slice, gate: str, dtype: torch.dtype
) -> None:
    """Where the walks leave half of the GPU idle."""
    args = repeated_keys(repeated, B=2, T=1000, H=15, HV=15, V=64, gate=gate, dtype=dtype)
    check(args, factor=2 if repeated.stop else 1)
    assert walks_beside(args, backend) == (backend == "hopper")


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("repeated", [slice(0), slice(290, 460), slice(1700, 1701)], ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 128, 128), (2, 8, 64, 72)], ids=str)
def test_a_gate_per_channel_beside_the_walk(
    backend: str, shape: tuple[int, int, int, int], repeated: slice, dtype: torch.dtype
) -> None:
    """The same with chunks of which a CTA prepares two at a time."""
    B, HV, K, V = shape
    args = repeated_keys(repeated, K=K, B=B, T=2500, H=HV // 2, HV=HV, V=V, gate="channel", dtype=dtype)
    # K = 64: as many tokens in a chunk as key channels, so keys are correlated, and little decays.
    check(args, factor=2 if repeated.stop or K == 64 else 1)
    assert walks_beside(args, backend) == (backend == "hopper")
    first = delta_rule(**cuda(args))[0]
    for _ in range(5):
        assert torch.equal(first, delta_rule(**cuda(args))[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("gate", ["none", "head"])
@pytest.mark.parametrize("repeated", [slice(0), slice(1000), slice(290, 460)], ids=str)
@pytest.mark.parametrize("shape", [(10, 1000), (18, 8192)], ids=["whole", "cut"])
def test_heads_in_clusters(
    backend: str, shape: tuple[int, int], repeated: slice, gate: str, dtype: torch.dtype
) -> None:
    """Sequences that clusters of CTAs prepare and walk over; more of them than clusters are cut."""
    HV, T = shape
    args = repeated_keys(repeated, B=2, T=T, H=HV // 2, HV=HV, V=128, gate=gate, dtype=dtype)
    check(args, factor=2 if repeated.stop else 1)
    events = kernels(lambda: delta_rule(**cuda(args)))
    assert any("head_cluster" in event.name for event in events) == (backend == "hopper")
    first = delta_rule(**cuda(args))[0]
    for _ in range(5):
        assert torch.equal(first, delta_rule(**cuda(args))[0])


@pytest.mark.parametrize("backend", ["hopper"], indirect=True)
@pytest.mark.parametrize(("shape", "repeated", "gate", "dtype"), [
    ((1, 31, 31, 128, 128, 8229), slice(0), "none", torch.bfloat16),
    ((1, 31, 31, 128, 128, 8229), slice(1000), "head", torch.bfloat16),
    ((1, 31, 31, 128, 128, 8229), slice(290, 460), "softplus", torch.float16),
    ((2, 8, 16, 64, 72, 16037), slice(290, 460), "head", torch.bfloat16),
    ((2, 8, 16, 64, 72, 16037), slice(0), "softplus", torch.float16),
], ids=str)  # fmt: skip
def test_heads_beside_clusters(
    backend: str, shape: tuple[int, int, int, int, int, int], repeated: slice, gate: str, dtype: torch.dtype
) -> None:
    """The last heads of the last sequence, for which no cluster is left, take the SMs that the others leave."""
    B, H, HV, K, V, T = shape
    args = repeated_keys(
        repeated, K=K, B=B, T=T, H=H, HV=HV, V=V, gate="none" if gate == "none" else "head", dtype=dtype
    )
    if gate == "softplus":
        args |= {"gate": "softplus", "A_log": torch.randn(HV) - 5, "dt_bias": torch.randn(HV)}
        args |= {"g": torch.randn(B, T, HV), "use_qk_l2norm": True, "state_v_first": True}
        args["initial_state"] = args["initial_state"].transpose(-1, -2).contiguous()
    # K = 64: as many tokens in a chunk as key channels, so keys are correlated.
    first = check(args, factor=2 if repeated.stop or K == 64 else 1)
    args = cuda(args)
    for _ in range(3):
        assert all(map(torch.equal, first, delta_rule(**args, output_final_state=True)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        twice = [delta_rule(**args, output_final_state=True) for _ in range(2)]
    for captured in twice:
        captured[0].fill_(math.nan)
    assert all(map(torch.equal, first, delta_rule(**args, output_final_state=True)))  # between captures
    graph.replay()
    for captured in twice:
        assert all(map(torch.equal, first, captured))
    names = [event.name for event in kernels(lambda: delta_rule(**args))]
    for kernel in ("head_cluster", "prepare", "state_pass"):
        assert any(kernel in name for name in names)


@pytest.mark.parametrize("dims", [(128, 128), (64, 72), (72, 200)], ids=str)
@pytest.mark.parametrize("gate", GATE_KINDS)
def test_few_heads_split_the_sequence(gate: str, dims: tuple[int, int]) -> None:
    """Long sequences of few heads are walked in spans, from the states composed of the spans before."""
    for initial in (True, False):
        args = make(
            T=9000, H=1, K=dims[0], V=dims[1], gate=gate, strength=0.1, dtype=torch.bfloat16, initial=initial
        )
        check(args)


@pytest.mark.parametrize("gate", GATE_KINDS)
@pytest.mark.parametrize(
    "bounds",
    [[0, 20000], [0, 0, 9000, 9001, 9001, 20000], [0, 64, 14000, 15024]],
    ids=["one", "uneven", "long"],
)
def test_split_packed_sequences(bounds: list[int], gate: str) -> None:
    N, T = len(bounds) - 1, bounds[-1] + 7
    args = make(B=1, T=T, H=1, K=128, V=64, gate=gate, strength=0.1, sequences=N, dtype=torch.bfloat16)
    args["initial_state"] = args["initial_state"].transpose(-1, -2).contiguous()
    o, _ = check(args | {"cu_seqlens": torch.tensor(bounds), "state_v_first": True})
    assert (o[:, bounds[-1] :] == 0).all()


@pytest.mark.parametrize("gate", GATE_KINDS)
@pytest.mark.parametrize(
    "bounds", [None, [0, 0, 130, 131, 400, 400], [0, 9000, 12000]], ids=["batch", "packed", "split"]
)
def test_states_on_the_way(bounds: list[int] | None, gate: str) -> None:
    T = bounds[-1] + 7 if bounds else 400
    args = make(
        B=1 if bounds else 2, T=T, H=1, K=128, V=64, gate=gate, strength=0.01, dtype=torch.bfloat16,
        sequences=len(bounds) - 1 if bounds else None,
    )  # fmt: skip
    args = cuda(args | ({"cu_seqlens": torch.tensor(bounds)} if bounds else {}))
    o, final, states = delta_rule_states(**args, every=2)
    plain, plain_final = delta_rule(**args, output_final_state=True)
    assert plain_final is not None
    assert torch.equal(o, plain)
    assert torch.equal(final, plain_final)
    assert states.shape[:2] == (args["q"].shape[0], T // 128)
    for n, (start, end) in enumerate(pairwise(bounds or [0, T])):
        S = args["initial_state"][n : n + 1] if bounds else args["initial_state"]
        S = S.double()
        for i in range((end - start) // 128):
            part = {
                name: args[name][:, start + 128 * i : start + 128 * (i + 1)]
                for name in args
                if name in ("q", "k", "v", "beta", "g")
            }
            _, S = delta_rule_by_chunks(**double(part), initial_state=S, output_final_state=True)
            assert S is not None
            kept = states[:, start // 128 + i].double()
            assert float((kept - S).norm()) <= L2_16BIT["final_state"] * float(S.norm())


@pytest.mark.parametrize("gate", GATE_KINDS)
def test_transition(gate: str) -> None:
    args = cuda(make(T=300, K=128, V=64, gate=gate, strength=0.01, dtype=torch.bfloat16))
    M, N = delta_rule_transition(args["k"], args["v"], args["beta"], args.get("g"))
    _, want = delta_rule_by_chunks(**double(args), output_final_state=True)
    assert want is not None
    got = M.double() @ args["initial_state"].double() + N.double()
    assert float((got - want).norm()) <= 2 * L2_16BIT["final_state"] * float(want.norm())


def test_no_tokens_keep_the_state() -> None:
    args = cuda(make(T=0, dtype=torch.bfloat16))
    o, state = delta_rule(**args, output_final_state=True)
    assert o.shape == (2, 0, 2, 16)
    assert state is not None
    assert torch.equal(state, args["initial_state"])
    del args["initial_state"]
    o, state = delta_rule(**args, output_final_state=True)
    assert state is not None
    assert (state == 0).all()


@pytest.mark.parametrize("HV", [1, 2, 4, 8])
def test_grouped_value_heads(HV: int) -> None:
    args = make(B=1, T=200, H=1, HV=HV, K=128, V=64, dtype=torch.bfloat16)
    o, _ = check(args)
    repeated = args | {name: args[name].repeat_interleave(HV, 2) for name in ("q", "k")}
    assert torch.equal(delta_rule(**cuda(repeated))[0], o)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("activation", ["none", "sigmoid", "sigmoid2"])
def test_fused_norm_and_beta(activation: str, dtype: torch.dtype) -> None:
    args: dict[str, Any] = make(T=200, HV=4, K=128, V=128, dtype=dtype)
    args["q"], args["k"] = 3 * args["q"], 5 * args["k"]
    if activation != "none":
        args["beta"] = torch.randn(args["beta"].shape)
    check(args | {"use_qk_l2norm": True, "beta_activation": activation})


@pytest.mark.parametrize("gate", ["head", "channel"])
@pytest.mark.parametrize("option", ["softplus", "softplus-bias", "bounded", "bounded-A", "bounded-A-bias"])
def test_fused_gates(option: str, gate: str) -> None:
    args: dict[str, Any] = make(T=200, HV=4, K=128, V=128, gate=gate, dtype=torch.bfloat16)
    args["g"] = torch.randn(args["g"].shape)
    args["gate"] = option.split("-")[0]
    if "softplus" in option or "A" in option:
        args["A_log"] = 0.5 * torch.randn(4)
    if "bias" in option:
        args["dt_bias"] = torch.randn(*((4, 128) if gate == "channel" else (4,)))
    args["gate_bound"] = -3.0
    check(args)


def test_small_tensors_in_16_bit() -> None:
    args = make(T=200, dtype=torch.bfloat16)
    args["beta"], args["g"] = args["beta"].bfloat16(), args["g"].bfloat16()
    check(args)


@pytest.mark.parametrize("K", [64, 128])
def test_state_v_first(K: int) -> None:
    args = make(T=130, K=K, V=72, dtype=torch.bfloat16, state_v_first=True)
    o, state = check(args | {"state_v_first": True})
    args["initial_state"] = args["initial_state"].transpose(-1, -2)
    o2, state2 = delta_rule(**cuda(args), output_final_state=True)
    assert state2 is not None
    assert torch.equal(o, o2)
    assert torch.equal(state, state2.transpose(-1, -2))


def test_scale() -> None:
    check(make(T=130, K=128, V=128, dtype=torch.bfloat16) | {"scale": -0.7})


# ------------------------------------------------------------------------------------------- packed sequences


@pytest.mark.parametrize("gate", GATE_KINDS)
@pytest.mark.parametrize("bounds", SEQUENCES.values(), ids=SEQUENCES.keys())
def test_packed(bounds: list[int], gate: str) -> None:
    """Packed equals the reference and, bit by bit, separate calls; padding full of NaN stays outside."""
    N, T = len(bounds) - 1, bounds[-1] + 7
    args = make(B=1, T=T, HV=4, K=128, V=128, gate=gate, sequences=N, dtype=torch.bfloat16)
    cu = torch.tensor(bounds, dtype=torch.int32)
    o, state = check(args | {"cu_seqlens": cu})
    dirty = {n: t.clone() for n, t in args.items()}
    for name in ("q", "k", "v", "beta", *(("g",) if gate != "none" else ())):
        dirty[name][:, bounds[-1] :] = math.nan
    dirty_o, dirty_state = delta_rule(**cuda(dirty | {"cu_seqlens": cu.long()}), output_final_state=True)
    assert dirty_state is not None
    assert torch.equal(dirty_o, o)
    assert torch.equal(dirty_state, state)
    assert (o[:, bounds[-1] :] == 0).all()
    for n, (start, end) in enumerate(pairwise(bounds)):
        one = {name: args[name][:, start:end] for name in args if name != "initial_state"}
        one["initial_state"] = args["initial_state"][n : n + 1]
        o_n, state_n = delta_rule(**cuda(one), output_final_state=True)
        assert state_n is not None
        assert torch.equal(o_n, o[:, start:end])
        assert torch.equal(state_n, state[n : n + 1])


def test_nan_stays_in_its_sequence() -> None:
    args = cuda(make(B=1, T=200, K=128, V=128, sequences=3, dtype=torch.bfloat16))
    args["cu_seqlens"] = torch.tensor([0, 50, 90, 200], device="cuda")
    o, _ = delta_rule(**args)
    for name in ("q", "k", "v", "beta", "g"):
        args[name][:, 50:90] = math.nan
    dirty, _ = delta_rule(**args)
    assert torch.equal(dirty[:, :50], o[:, :50])
    assert torch.equal(dirty[:, 90:], o[:, 90:])


@pytest.mark.parametrize("gate", GATE_KINDS)
@pytest.mark.parametrize("m", [1, 63, 64, 100])
def test_split_and_resume(m: int, gate: str) -> None:
    args = cuda(make(T=300, K=128, V=128, gate=gate, strength=0.1, dtype=torch.bfloat16))
    state = args.pop("initial_state")
    whole, final = delta_rule(**args, initial_state=state, output_final_state=True)
    parts = []
    for rows in (slice(0, m), slice(m, None)):
        part = {name: t[:, rows] for name, t in args.items()}
        o, new_state = delta_rule(**part, initial_state=state, output_final_state=True)
        assert new_state is not None
        state = new_state
        parts.append(o)
    resumed = torch.cat(parts, 1)
    assert final is not None
    for name, a, b in (("o", resumed, whole), ("final_state", state, final)):
        # Both are as far from the truth as the tolerance allows.
        assert float((a - b).norm()) <= 2 * L2_16BIT[name] * float(b.norm()), name


# ------------------------------------------------------------------------------------------------ edge cases


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("gate", ["head", "channel"])
@pytest.mark.parametrize("kind", ["0", "-1e-6", "-5", "-50", "-1e4", "-inf", "mixed", "rare-inf", "one-inf"])
def test_hostile_gates(kind: str, gate: str, dtype: torch.dtype) -> None:
    args = make(B=1, T=300, K=128, V=128, gate=gate, dtype=dtype)
    args["g"] = hostile_gates(kind, args["g"].shape)
    check(args)


def test_zero_gates_are_no_gates() -> None:
    """Bit by bit, for a gate per head."""
    args = cuda(make(T=200, K=128, V=128, dtype=torch.bfloat16))
    args["g"] = torch.zeros_like(args["g"])
    gated = delta_rule(**args, output_final_state=True)
    del args["g"]
    for a, b in zip(gated, delta_rule(**args, output_final_state=True), strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


@pytest.mark.parametrize("beta", [0.0, 1.0, 1.99])
def test_constant_beta(beta: float) -> None:
    args = make(T=300, K=128, V=128, gate="none", dtype=torch.bfloat16)
    args["beta"] = torch.full_like(args["beta"], beta)
    check(args, factor=2)


def test_zero_rows() -> None:
    args: dict[str, Any] = make(T=100, K=128, V=128, dtype=torch.bfloat16)
    args["q"][:, 10:20] = 0
    args["k"][:, 15:70] = 0
    check(args | {"use_qk_l2norm": True})


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("beta_top", [1.0, 1.9])
@pytest.mark.parametrize("gate", GATE_KINDS)
@pytest.mark.parametrize("kind", ["identical", "plus-minus", "four-dimensional", "correlated"])
def test_repeated_keys(kind: str, gate: str, beta_top: float, dtype: torch.dtype) -> None:
    args = make(B=1, T=300, K=128, V=128, gate=gate, strength=0.01, dtype=dtype)
    args["k"] = correlated_keys(kind, args["k"].shape).to(dtype)
    args["beta"] = beta_top * (0.9 + 0.1 * torch.rand(args["beta"].shape))
    check(args, factor=2)


@pytest.mark.parametrize("gate", GATE_KINDS)
def test_large_state(gate: str) -> None:
    args = make(T=200, K=128, V=128, gate=gate, strength=0.05, dtype=torch.bfloat16)
    args["initial_state"] *= 100
    check(args)


def test_strides() -> None:
    """Heads-first and sliced storage are read in place, what the copy engine cannot read is copied: same bits."""
    args = cuda(make(B=2, T=70, H=2, HV=4, K=64, V=64, dtype=torch.bfloat16))
    want = delta_rule(**args, output_final_state=True)
    moved = dict(args)
    moved["q"] = args["q"].transpose(1, 2).contiguous().transpose(1, 2)
    moved["k"] = torch.cat([args["k"], args["k"]], -1)[..., 1:65].copy_(args["k"])  # not on 16 bytes
    moved["v"] = torch.cat([args["v"], torch.full_like(args["v"], math.nan)], -1)[..., :64]
    moved["g"] = args["g"].transpose(1, 2).contiguous().transpose(1, 2)
    moved["initial_state"] = args["initial_state"].transpose(-1, -2).contiguous().transpose(-1, -2)
    for a, b in zip(delta_rule(**moved, output_final_state=True), want, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


def test_offsets_beyond_32_bits() -> None:
    B, T, H, D = 5, 4096, 1024, 128
    q = torch.zeros(B, T, H, D, device="cuda", dtype=torch.bfloat16)
    assert q.numel() > 2**31
    tail = {n: F.normalize(torch.randn(1, 100, 1, D, device="cuda"), dim=-1).bfloat16() for n in "qkv"}
    q[-1:, -100:, -1:] = tail["k"]
    beta = torch.zeros(B, T, H, device="cuda")
    beta[-1, -100:, -1] = 0.5
    o, _ = delta_rule(q, q, q, beta)
    want, _ = delta_rule(tail["k"], tail["k"], tail["k"], beta[-1:, -100:, -1:].contiguous())
    error = (o[-1:, -100:, -1:] - want).float().norm() / want.float().norm()
    assert float(error) < L2_16BIT["o"]


# ----------------------------------------------------------------------------------------- framework contract


def test_side_stream_and_graph() -> None:
    args = cuda(make(B=1, T=500, H=4, HV=4, K=128, V=128, dtype=torch.bfloat16))
    want, _ = delta_rule(**args)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        got, _ = delta_rule(**args)
        assert not stream.query(), "the launch waited for the stream"
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = delta_rule(**args)
    for _ in range(3):
        captured.fill_(math.nan)
        graph.replay()
        assert torch.equal(captured, want)


@pytest.mark.parametrize("H", [2, 96])
def test_bitwise_repeatable(H: int) -> None:
    args = cuda(make(B=2, T=500, H=H, HV=H, K=128, V=128, dtype=torch.bfloat16))
    first = delta_rule(**args, output_final_state=True)
    for _ in range(20):
        for a, b in zip(first, delta_rule(**args, output_final_state=True), strict=True):
            assert a is not None
            assert b is not None
            assert torch.equal(a, b)


def test_compile_and_opcheck() -> None:
    args = cuda(make(B=1, T=200, H=2, HV=4, K=128, V=128, sequences=2, dtype=torch.bfloat16))
    args["cu_seqlens"] = torch.tensor([0, 70, 190], device="cuda")

    def f(**kw: Tensor) -> tuple[Tensor, Tensor | None]:
        return delta_rule(**kw, use_qk_l2norm=True, output_final_state=True)

    torch._dynamo.reset()
    for a, b in zip(torch.compile(f, fullgraph=True)(**args), f(**args), strict=True):
        assert torch.equal(a, b)
    names = ("q", "k", "v", "beta", "g", "initial_state", "A_log", "dt_bias", "cu_seqlens")
    torch.library.opcheck(
        torch.ops.nearfield.delta_fwd.default,
        (*(args.get(n) for n in names), 0.5, True, 0, 0, -5.0, False, True),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize(
    "dtype, K, V, words",
    [
        (torch.float32, 64, 64, "Hopper's kernels take bfloat16, float16"),
        (torch.bfloat16, 60, 64, "multiples of 8"),
        (torch.bfloat16, 64, 100, "multiples of 8"),
        (torch.bfloat16, 264, 64, "channels"),
        (torch.float64, 64, 64, "bfloat16, float16"),
    ],
)
def test_what_is_not_built_is_refused(backend: str, dtype: torch.dtype, K: int, V: int, words: str) -> None:
    if backend == "portable" and K <= 256 and dtype != torch.float64:
        pytest.skip("the portable kernels serve it")
    with pytest.raises(RuntimeError, match=words):
        delta_rule(**cuda(make(T=9, K=K, V=V, dtype=dtype)))
