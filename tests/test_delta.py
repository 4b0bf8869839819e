"""The delta rule against its token recurrence in float64: values, gradients, decode, edge cases, torch."""

from __future__ import annotations

import math
import resource
from itertools import pairwise
from typing import Any

import nearfield
import pytest
import torch
import torch.nn.functional as F
from compare import assert_accurate
from delta_chunks import delta_rule_by_chunks
from hypothesis import given
from hypothesis import strategies as st
from nearfield._accuracy import DELTA_FACTOR
from nearfield.delta import (
    PendingTokens,
    delta_rule,
    delta_rule_commit,
    delta_rule_reference,
    delta_rule_states,
    delta_rule_states_reference,
    delta_rule_step,
    delta_rule_transition,
    delta_rule_verify,
    op,
)
from torch import Tensor

GATE_KINDS = ("none", "head", "channel")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Relative L2 errors that 16-bit inputs may have against float64 on the same rounded inputs.
L2_16BIT = {
    "o": 4e-3,
    "final_state": 4e-3,
    "q": 6e-3,
    "k": 6e-3,
    "v": 6e-3,
    "initial_state": 6e-3,
    "beta": 1e-2,
}
# Float32 errors over those of the recurrence: with repeated keys the writes alternate and cancel, which magnifies
# the difference.
FLOAT32_FACTOR, FLOAT32_REPEATED_FACTOR = DELTA_FACTOR, 12.0
LEAVES = ("q", "k", "v", "beta", "g", "initial_state", "A_log", "dt_bias")


def name_of(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def make(
    B: int = 2,
    T: int = 100,
    H: int = 2,
    HV: int = 2,
    K: int = 24,
    V: int = 16,
    *,
    gate: str = "head",
    dtype: torch.dtype = torch.float64,
    strength: float = 1.0,
    beta_top: float = 1.0,
    initial: bool = True,
    sequences: int | None = None,
    state_v_first: bool = False,
) -> dict[str, Tensor]:
    """Arguments of delta_rule with unit keys; g and states in float32 for 16-bit dtypes."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = {
        "q": F.normalize(torch.randn(B, T, H, K, dtype=torch.float64), dim=-1).to(dtype),
        "k": F.normalize(torch.randn(B, T, H, K, dtype=torch.float64), dim=-1).to(dtype),
        "v": torch.randn(B, T, HV, V, dtype=torch.float64).to(dtype),
        "beta": beta_top * torch.rand(B, T, HV, dtype=wide),
    }
    if gate != "none":
        x["g"] = -strength * torch.rand(*([B, T, HV, K] if gate == "channel" else [B, T, HV]), dtype=wide)
    if initial:
        sizes = (V, K) if state_v_first else (K, V)
        x["initial_state"] = torch.randn(B if sequences is None else sequences, HV, *sizes, dtype=wide)
    return x


def run(
    function: Any, args: dict[str, Any], d_o: Tensor | None, d_state: Tensor | None, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """o, final_state and the gradient of every floating-point argument. dtype None keeps the dtypes."""
    args = dict(args)
    leaves = {}
    for name in LEAVES:
        if args.get(name) is not None:
            leaf = args[name].detach()
            leaf = leaf.clone(memory_format=torch.preserve_format) if dtype is None else leaf.to(dtype)
            args[name] = leaves[name] = leaf.requires_grad_()
    o, final_state = function(**args, output_final_state=True)
    pairs = [(o, d_o), (final_state, d_state)]
    pairs = [(y, dy.to(y.dtype)) for y, dy in pairs if dy is not None and y.requires_grad]
    grads = torch.autograd.grad(
        [y for y, _ in pairs], list(leaves.values()), [dy for _, dy in pairs], allow_unused=True
    )
    results = {"o": o.detach(), "final_state": final_state.detach()}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        results[name] = torch.zeros_like(leaf) if grad is None else grad
    return results


def check(
    args: dict[str, Any],
    *,
    only: str | None = None,
    l2_factor: float = 1.0,
    factor: float | None = None,
    scales: dict[str, float] | None = None,
) -> dict[str, Tensor]:
    """delta_rule(**args) and its gradients against float64; the yardstick is the recurrence in q's dtype."""
    dtype = args["q"].dtype
    if factor is None:
        factor = FLOAT32_FACTOR if dtype == torch.float32 else 2.0
    o, state = delta_rule(**args, output_final_state=True)
    assert state is not None
    d_o = None if only == "state" else torch.randn(o.shape, dtype=torch.float64).to(o.dtype)
    d_state = None if only == "o" else torch.randn(state.shape, dtype=torch.float64).to(state.dtype)
    got = run(delta_rule, args, d_o, d_state, None)
    truth = run(delta_rule_reference, args, d_o, d_state, torch.float64)
    eager = truth if dtype == torch.float64 else run(delta_rule_reference, args, d_o, d_state, dtype)
    assert torch.equal(got["o"], o)
    for name, value in got.items():
        expected_dtype = args[name].dtype if name in args else (o.dtype if name == "o" else state.dtype)
        assert value.dtype == expected_dtype, name
        scale = (scales or {}).get(name, 0.0)
        assert_accurate(name, value, truth[name], eager[name], factor=factor, scale=scale)
        if dtype in (torch.bfloat16, torch.float16) and value.numel():
            allowed = l2_factor * L2_16BIT.get(name, 1e-2) * max(float(truth[name].norm()), scale)
            error = float((value.double() - truth[name]).norm())
            assert error <= allowed, f"{name}: L2 error {error:.3g} > {allowed:.3g}"
    return got


# ---------------------------------------------------------------------------------- the definition, by hand


@pytest.mark.parametrize("function", [delta_rule, delta_rule_reference])
def test_memory_by_hand(function: Any) -> None:
    """Write two values under two keys, overwrite the first, forget half, read by key: small exact numbers."""
    e = torch.eye(2, dtype=torch.float64)
    k = e[[0, 1, 0, 1]].reshape(1, 4, 1, 2)
    v = torch.tensor([[3.0], [5.0], [7.0], [0.0]], dtype=torch.float64).reshape(1, 4, 1, 1)
    q = e[[0, 1, 0, 0]].reshape(1, 4, 1, 2)
    beta = torch.tensor([1.0, 1.0, 0.5, 0.0], dtype=torch.float64).reshape(1, 4, 1)
    g = torch.tensor([0.0, 0.0, 0.0, math.log(0.5)], dtype=torch.float64).reshape(1, 4, 1)
    o, state = function(q, k, v, beta, g, scale=1.0, output_final_state=True)
    # 3 and 5 are stored; half of the error of 3 to 7 is written, giving 5; half of everything is forgotten.
    torch.testing.assert_close(o.flatten(), torch.tensor([3.0, 5.0, 5.0, 2.5], dtype=torch.float64))
    torch.testing.assert_close(state.flatten(), torch.tensor([2.5, 2.5], dtype=torch.float64))


@pytest.mark.parametrize("gates", ["mild", "-5", "mixed", "one-inf"])
@pytest.mark.parametrize("gate", GATE_KINDS)
def test_reference_by_chunks(gate: str, gates: str) -> None:
    """The reference of the GPU tests equals the definition."""
    args = make(T=200, HV=4, gate=gate)
    if gate != "none" and gates != "mild":
        args["g"] = hostile_gates(gates, args["g"].shape).double()
    got = delta_rule_by_chunks(**args, output_final_state=True)
    want = delta_rule_reference(**args, output_final_state=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


# ------------------------------------------------------------------------------- accuracy, lengths, options


@pytest.mark.parametrize("gate", GATE_KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=name_of)
@pytest.mark.parametrize(
    "shape",
    [(2, 130, 2, 2, 32, 32), (1, 100, 1, 2, 60, 100)],
    ids=["B2-T130-H2-D32", "B1-T100-H1-HV2-K60-V100"],
)
def test_matches_recurrence(shape: tuple[int, ...], dtype: torch.dtype, gate: str) -> None:
    check(make(*shape, gate=gate, dtype=dtype))


@pytest.mark.parametrize("gate", GATE_KINDS)
@pytest.mark.parametrize("T", [0, 1, 15, 16, 17, 63, 64, 65, 127])
def test_lengths(T: int, gate: str) -> None:
    check(make(T=T, gate=gate))
    check(make(T=T, gate=gate, dtype=torch.float32, initial=False))


def test_no_tokens_keep_the_state() -> None:
    args = make(T=0)
    o, state = delta_rule(**args, output_final_state=True)
    assert o.shape == (2, 0, 2, 16)
    assert torch.equal(state, args["initial_state"])


def test_zero_size_batch() -> None:
    o, state = delta_rule(**make(B=0, T=5), output_final_state=True)
    assert o.shape == (0, 5, 2, 16)
    assert state.shape == (0, 2, 24, 16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("gate_kind", ["head", "channel"])
@pytest.mark.parametrize("option", ["softplus", "softplus-bias", "bounded", "bounded-A", "bounded-A-bias"])
def test_fused_gates(option: str, gate_kind: str, dtype: torch.dtype) -> None:
    HV, K = 4, 24
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    args: dict[str, Any] = make(H=2, HV=HV, K=K, gate=gate_kind, dtype=dtype)
    args["g"] = torch.randn(args["g"].shape, dtype=wide)
    args["gate"] = option.split("-")[0]
    if "softplus" in option or "A" in option:
        args["A_log"] = 0.5 * torch.randn(HV, dtype=wide)
    if "bias" in option:
        args["dt_bias"] = torch.randn(*((HV, K) if gate_kind == "channel" else (HV,)), dtype=wide)
    args["gate_bound"] = -3.0
    check(args)


def test_flat_channel_bias() -> None:
    args: dict[str, Any] = make(gate="channel") | {"gate": "bounded"}
    bias = torch.randn(2, 24, dtype=torch.float64)
    assert torch.equal(delta_rule(**args, dt_bias=bias)[0], delta_rule(**args, dt_bias=bias.flatten())[0])


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=name_of)
@pytest.mark.parametrize("activation", ["none", "sigmoid", "sigmoid2"])
def test_fused_norm_and_beta(activation: str, dtype: torch.dtype) -> None:
    args: dict[str, Any] = make(dtype=dtype, HV=4)
    args["q"], args["k"] = 3 * args["q"], 5 * args["k"]
    if activation != "none":
        args["beta"] = torch.randn(args["beta"].shape, dtype=args["beta"].dtype)
    check(args | {"use_qk_l2norm": True, "beta_activation": activation})


@pytest.mark.parametrize("gate", GATE_KINDS)
def test_state_v_first(gate: str) -> None:
    args = make(gate=gate, state_v_first=True)
    check(args | {"state_v_first": True})
    o, state = delta_rule(**args, state_v_first=True, output_final_state=True)
    args["initial_state"] = args["initial_state"].transpose(-1, -2)
    o2, state2 = delta_rule(**args, output_final_state=True)
    assert torch.equal(o, o2)
    assert torch.equal(state, state2.transpose(-1, -2))


def test_scale() -> None:
    args = make()
    check(args | {"scale": 0.7})
    default = delta_rule(**args)[0]
    assert torch.equal(default, delta_rule(**args, scale=24**-0.5)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_small_tensors_in_16_bit(dtype: torch.dtype) -> None:
    """beta, g and their parameters may have q's dtype; their gradients come back in it."""
    args: dict[str, Any] = make(gate="channel", dtype=dtype)
    args |= {"A_log": torch.randn(2), "dt_bias": torch.randn(2, 24), "gate": "softplus"}
    for name in ("beta", "g", "A_log", "dt_bias"):
        args[name] = args[name].to(dtype)
    check(args)


@pytest.mark.parametrize("HV", [1, 2, 4, 8])
@pytest.mark.parametrize("gate", GATE_KINDS)
def test_grouped_value_heads(HV: int, gate: str) -> None:
    args = make(B=1, T=70, H=1, HV=HV, gate=gate)
    got = check(args)
    repeated = args | {name: args[name].repeat_interleave(HV, 2) for name in ("q", "k")}
    assert torch.equal(delta_rule(**repeated)[0], got["o"])


def test_gate_of_one_channel_is_a_gate_per_head() -> None:
    """K = 1 with a gate per channel and a gate per head are the same recurrence."""
    args = make(K=1, V=8, gate="channel")
    d_o = torch.randn(2, 100, 2, 8, dtype=torch.float64)
    channel = run(delta_rule, args, d_o, None, None)
    head = run(delta_rule, args | {"g": args["g"][..., 0]}, d_o, None, None)
    for name, value in head.items():
        torch.testing.assert_close(channel[name].view_as(value), value, rtol=1e-11, atol=1e-12)


# ------------------------------------------------------------------------------------------- packed sequences

SEQUENCES = {
    "empty-first": [0, 0, 30, 100],
    "empty-last": [0, 30, 100, 100],
    "empty-adjacent": [0, 64, 64, 64, 130],
    "all-short": [0, 1, 16, 33, 63, 100],
    "all-empty": [0, 0, 0],
    "none": [0],
    "long": [0, 63, 200],
}


@pytest.mark.parametrize("gate", GATE_KINDS)
@pytest.mark.parametrize("bounds", SEQUENCES.values(), ids=SEQUENCES.keys())
def test_packed(bounds: list[int], gate: str) -> None:
    """Packed equals the reference and, bit by bit, separate calls; padding full of NaN stays outside."""
    N, T = len(bounds) - 1, bounds[-1] + 7
    args: dict[str, Any] = make(B=1, T=T, HV=4, gate=gate, sequences=N)
    cu = torch.tensor(bounds, dtype=torch.int32)
    clean = check(args | {"cu_seqlens": cu})
    d_o, d_state = torch.randn_like(clean["o"]), torch.randn_like(clean["final_state"])
    dirty = {n: t.clone() for n, t in args.items()}
    for name in ("q", "k", "v", "beta", *(("g",) if gate != "none" else ())):
        dirty[name][:, bounds[-1] :] = math.nan
    d_o[:, bounds[-1] :] = math.nan
    got = run(delta_rule, dirty | {"cu_seqlens": cu.long()}, d_o, d_state, None)
    for name in ("o", "q", "k", "v", "beta", *(("g",) if gate != "none" else ())):
        assert (got[name][:, bounds[-1] :] == 0).all(), name
    for n, (start, end) in enumerate(pairwise(bounds)):
        one = {name: args[name][:, start:end] for name in args if name != "initial_state"}
        one["initial_state"] = args["initial_state"][n : n + 1]
        separate = run(delta_rule, one, d_o[:, start:end], d_state[n : n + 1], None)
        for name, value in separate.items():
            of_n = got[name][n : n + 1] if "state" in name else got[name][:, start:end]
            assert torch.equal(value, of_n), f"{name} of sequence {n}"


def test_packed_gate_parameters() -> None:
    args: dict[str, Any] = make(B=1, T=140, gate="channel", sequences=3)
    args |= {"A_log": torch.randn(2).double(), "dt_bias": torch.randn(2, 24).double(), "gate": "softplus"}
    check(args | {"cu_seqlens": torch.tensor([0, 5, 5, 131])})


# ------------------------------------------------------------------------------------------------ edge cases


def hostile_gates(kind: str, shape: torch.Size) -> Tensor:
    if kind == "mixed":
        return torch.where(torch.rand(shape) < 0.3, -torch.rand(shape) * 60, torch.zeros(shape))
    if kind == "rare-inf":
        return torch.where(torch.rand(shape) < 0.05, torch.full(shape, -math.inf), -0.1 * torch.rand(shape))
    if kind == "one-inf":
        g = -0.01 * torch.rand(shape)
        g[:, 33] = -math.inf
        return g
    return torch.full(shape, float(kind))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("gate", ["head", "channel"])
@pytest.mark.parametrize("kind", ["0", "-1e-6", "-5", "-50", "-1e4", "-inf", "mixed", "rare-inf", "one-inf"])
def test_hostile_gates(kind: str, gate: str, dtype: torch.dtype) -> None:
    """No slack is given to dg, which cancels to almost nothing under strong gates."""
    args = make(B=1, T=100, gate=gate, dtype=dtype)
    args["g"] = hostile_gates(kind, args["g"].shape).to(args["g"].dtype)
    got = check(args)
    if kind == "-inf":
        assert (got["g"] == 0).all()
        assert (got["initial_state"] == 0).all()


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_zero_gates_are_no_gates(gate: str) -> None:
    args = make(gate=gate, dtype=torch.float32)
    args["g"] = torch.zeros_like(args["g"])
    plain = {name: t for name, t in args.items() if name != "g"}
    for got, want in zip(
        delta_rule(**args, output_final_state=True), delta_rule(**plain, output_final_state=True), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_strong_softplus_gates(gate: str) -> None:
    """|g| up to 16 x softplus(3)."""
    args: dict[str, Any] = make(gate=gate, dtype=torch.float32)
    args["g"] = 3 * torch.randn(args["g"].shape)
    check(args | {"gate": "softplus", "A_log": torch.tensor([math.log(16.0), -2.0])})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("beta", [0.0, 1.0, 1.99])
def test_constant_beta(beta: float, dtype: torch.dtype) -> None:
    args = make(gate="none", dtype=dtype)
    args["beta"] = torch.full_like(args["beta"], beta)
    check(args, l2_factor=2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=name_of)
def test_zero_rows(dtype: torch.dtype) -> None:
    """The norm of a zero row is eps: its gradient is finite."""
    args: dict[str, Any] = make(gate="head", dtype=dtype)
    args["q"][:, 10:20] = 0
    args["k"][:, 15:70] = 0
    check(args | {"use_qk_l2norm": True})


def correlated_keys(kind: str, shape: torch.Size) -> Tensor:
    base, noise = torch.randn(shape[0], 1, *shape[2:]), torch.randn(shape)
    if kind == "identical":
        k = base.expand(shape)
    elif kind == "plus-minus":
        k = base * torch.randint(0, 2, (shape[0], shape[1], shape[2], 1)).mul(2).sub(1)
    elif kind == "four-dimensional":
        k = torch.randn(*shape[:3], 4) @ torch.randn(4, shape[3])
    else:
        k = 0.9 * F.normalize(base, dim=-1) + math.sqrt(1 - 0.81) * F.normalize(noise, dim=-1)
    return F.normalize(k.double(), dim=-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("beta_top", [1.0, 1.9])
@pytest.mark.parametrize("gate", GATE_KINDS)
@pytest.mark.parametrize("kind", ["identical", "plus-minus", "four-dimensional", "correlated"])
def test_repeated_keys(kind: str, gate: str, beta_top: float, dtype: torch.dtype) -> None:
    args = make(B=1, T=100, gate=gate, strength=0.01, dtype=dtype)
    args["k"] = correlated_keys(kind, args["k"].shape).to(dtype)
    args["beta"] = (beta_top * (0.9 + 0.1 * torch.rand(args["beta"].shape))).to(args["beta"].dtype)
    check(args, l2_factor=2, factor=FLOAT32_REPEATED_FACTOR if dtype == torch.float32 else None)


@pytest.mark.parametrize("gate", GATE_KINDS)
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("bounds", [None, [0, 0, 130, 131, 320, 320]], ids=["batch", "packed"])
def test_states_on_the_way(bounds: list[int] | None, every: int, gate: str) -> None:
    """The states after every so many chunks are the final states of prefixes."""
    args = make(B=2 if bounds is None else 1, T=327, gate=gate, sequences=5 if bounds else None)
    cu = None if bounds is None else torch.tensor(bounds)
    for v_first in (False, True):
        o, final, states = delta_rule_states(**args, every=every, cu_seqlens=cu, state_v_first=v_first)
        inputs = (args[name] for name in ("k", "v", "beta"))
        want = delta_rule_states_reference(
            *inputs, args.get("g"), every, args["initial_state"], cu_seqlens=cu, state_v_first=v_first
        )
        torch.testing.assert_close(states, want)
        plain = delta_rule(**args, output_final_state=True, cu_seqlens=cu, state_v_first=v_first)
        assert torch.equal(o, plain[0])
        assert torch.equal(final, plain[1])
        args["initial_state"] = args["initial_state"].transpose(-1, -2).contiguous()


@pytest.mark.parametrize("gate", GATE_KINDS)
@pytest.mark.parametrize("bounds", [None, [0, 0, 30, 100]], ids=["batch", "packed"])
def test_transition(bounds: list[int] | None, gate: str) -> None:
    """S -> M S + N is what a sequence does to its initial state; spans compose."""
    args = make(B=2 if bounds is None else 1, T=100, gate=gate, sequences=3 if bounds else None)
    cu = None if bounds is None else torch.tensor(bounds)
    span = [args[name] for name in ("k", "v", "beta")] + [args.get("g")]
    M, N = delta_rule_transition(*span, cu_seqlens=cu)
    _, want = delta_rule(**args, output_final_state=True, cu_seqlens=cu)
    torch.testing.assert_close(M @ args["initial_state"] + N, want)
    if bounds is None:
        halves = [
            delta_rule_transition(*(x if x is None else x[:, rows] for x in span))
            for rows in (slice(0, 37), slice(37, None))
        ]
        (M1, N1), (M2, N2) = halves
        torch.testing.assert_close(M2 @ M1, M)
        torch.testing.assert_close(M2 @ N1 + N2, N)


def test_states_and_transitions_say_what_they_refuse() -> None:
    args = make()
    with pytest.raises(ValueError, match="every is 0"):
        delta_rule_states(**args, every=0)
    with pytest.raises(ValueError, match="no gradient"):
        delta_rule_states(**args | {"k": args["k"].requires_grad_()}, every=1)
    with pytest.raises(ValueError, match="delta_rule_transition: beta"):
        delta_rule_transition(args["k"].detach(), args["v"], args["beta"][:, :5])


@pytest.mark.parametrize("gate", GATE_KINDS)
def test_absent_state_is_zero(gate: str) -> None:
    args = make(T=150, gate=gate, initial=False, dtype=torch.float32)
    d_o, d_state = torch.randn(2, 150, 2, 16), torch.randn(2, 2, 24, 16)
    absent = run(delta_rule, args, d_o, d_state, None)
    zero = run(delta_rule, args | {"initial_state": torch.zeros(2, 2, 24, 16)}, d_o, d_state, None)
    for name, value in absent.items():
        assert torch.equal(value, zero[name]), name
    if gate != "none":
        assert (absent["g"][:, 0] == 0).all()  # the first gate scales an empty memory
        assert (absent["g"][:, 1] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("gate", GATE_KINDS)
def test_large_state(gate: str, dtype: torch.dtype) -> None:
    args = make(gate=gate, strength=0.05, dtype=dtype)
    args["initial_state"] *= 100
    check(args)


@pytest.mark.parametrize("gate", GATE_KINDS)
@pytest.mark.parametrize("only", ["o", "state"])
def test_one_gradient(only: str, gate: str) -> None:
    got = check(make(gate=gate), only=only)
    if only == "state":
        assert (got["q"] == 0).all()


def test_no_state_output() -> None:
    args = make()
    o, state = delta_rule(**args)
    assert state is None
    q = args["q"].requires_grad_()
    (grad,) = torch.autograd.grad(delta_rule(**args)[0].sum(), q)
    assert grad.isfinite().all()
    assert torch.equal(o, delta_rule(**args, output_final_state=True)[0])


@pytest.mark.parametrize("wanted", LEAVES[:6])
def test_gradient_of_one_input(wanted: str) -> None:
    args = make(gate="channel")
    everything = run(delta_rule, args, torch.ones(2, 100, 2, 16), torch.ones(2, 2, 24, 16), None)
    args[wanted].requires_grad_()
    o, state = delta_rule(**args, output_final_state=True)
    (o.sum() + state.sum()).backward()
    assert torch.equal(args[wanted].grad, everything[wanted])
    assert all(t.grad is None for name, t in args.items() if name != wanted)


def test_strides() -> None:
    """Heads-first and sliced storage, and an expanded gradient, are read in place."""
    args = make(B=2, T=70, H=2, HV=4, gate="channel")
    want = check(args)
    moved = dict(args)
    for name in ("q", "k", "v"):
        moved[name] = args[name].transpose(1, 2).contiguous().transpose(1, 2)
    moved["v"] = torch.cat([args["v"], torch.full_like(args["v"], math.nan)], -1)[..., :16]
    moved["g"] = args["g"].permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    moved["beta"] = args["beta"].transpose(1, 2).contiguous().transpose(1, 2)
    moved["initial_state"] = args["initial_state"].transpose(-1, -2).contiguous().transpose(-1, -2)
    moved["q"] = args["q"].transpose(-1, -2).contiguous().transpose(-1, -2)  # innermost stride is not 1
    o, state = delta_rule(**moved, output_final_state=True)
    assert torch.equal(o, want["o"])
    assert torch.equal(state, want["final_state"])
    ones = torch.ones((), dtype=torch.float64)
    a = run(delta_rule, moved, ones.expand(want["o"].shape), None, None)
    b = run(delta_rule, args, torch.ones_like(want["o"]), None, None)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_offsets_past_2_to_the_31() -> None:
    """A state pool and token tensors that reach past 2^31 elements; the memory between is never touched."""
    T, K, V = 3, 8, 8
    step = 2**30 + 64
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        store = torch.empty(2 * step + 4096, dtype=torch.bfloat16)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    args = make(B=1, T=T, H=1, HV=1, K=K, V=V, dtype=torch.bfloat16, initial=False)
    far = dict(args)
    for place, name in enumerate(("q", "k", "v")):
        far[name] = store[place * 64 :].as_strided((1, T, 1, K), (3 * step, step, K, 1))
        far[name].copy_(args[name])
    assert torch.equal(delta_rule(**far)[0], delta_rule(**args)[0])
    pool = store[1024:].as_strided((3, 1, K, V), (step, K * V, V, 1))
    near = torch.randn(3, 1, K, V).bfloat16()
    pool.copy_(near)
    slot = torch.tensor([2])
    assert torch.equal(
        delta_rule_step(**far, state=pool, read_idx=slot), delta_rule_step(**args, state=near, read_idx=slot)
    )
    assert torch.equal(pool, near)


@pytest.mark.parametrize("gate", GATE_KINDS)
@pytest.mark.parametrize("m", [1, 50, 64, 100])
def test_split_and_resume(m: int, gate: str) -> None:
    args = make(T=150, gate=gate)
    whole, state = delta_rule(**args, output_final_state=True)
    tokens = [name for name in args if name != "initial_state"]
    first, middle = delta_rule(**args | {n: args[n][:, :m] for n in tokens}, output_final_state=True)
    rest = {n: args[n][:, m:] for n in tokens} | {"initial_state": middle}
    second, last = delta_rule(**rest, output_final_state=True)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(last, state, rtol=1e-11, atol=1e-12)


def test_causal() -> None:
    args = make(T=130, gate="channel")
    want = delta_rule(**args)[0][:, :70]
    for name in ("q", "k", "v", "beta", "g"):
        args[name][:, 70:] *= 0.5
    assert torch.equal(delta_rule(**args)[0][:, :70], want)


@pytest.mark.parametrize("gate", GATE_KINDS)
def test_gradcheck(gate: str) -> None:
    args: dict[str, Any] = make(B=1, T=5, H=1, HV=2, K=3, V=2, gate=gate)
    options: dict[str, Any] = {
        "use_qk_l2norm": True,
        "beta_activation": "sigmoid2",
        "output_final_state": True,
    }
    if gate != "none":
        options["gate"] = "softplus" if gate == "head" else "bounded"
        args["A_log"] = torch.randn(2, dtype=torch.float64)
        args["dt_bias"] = torch.randn(*((2, 3) if gate == "channel" else (2,)), dtype=torch.float64)
    names = list(args)

    def function(*tensors: Tensor) -> Any:
        return delta_rule(**dict(zip(names, tensors, strict=True)), **options)

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in args.values()])


def test_no_second_derivative() -> None:
    args = make(T=5)
    args["q"].requires_grad_()
    (grad,) = torch.autograd.grad(delta_rule(**args)[0].sum(), args["q"], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


@given(
    data=st.data(),
    T=st.integers(0, 140),
    H=st.integers(1, 3),
    group=st.integers(1, 3),
    K=st.integers(1, 40),
    V=st.integers(1, 70),
    gate=st.sampled_from(["none", "log", "softplus", "bounded"]),
    per_channel=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    l2norm=st.booleans(),
    activation=st.sampled_from(["none", "sigmoid", "sigmoid2"]),
    v_first=st.booleans(),
    initial=st.booleans(),
    only=st.sampled_from([None, "o", "state"]),
)
def test_any_shape_and_option(
    data: st.DataObject, T: int, H: int, group: int, K: int, V: int, gate: str, per_channel: bool,
    dtype: torch.dtype, l2norm: bool, activation: str, v_first: bool, initial: bool, only: str | None,
) -> None:  # fmt: skip
    torch.manual_seed(T * 1000 + K)
    cuts = data.draw(st.none() | st.lists(st.integers(0, T), max_size=4))
    kind = "none" if gate == "none" else "channel" if per_channel else "head"
    HV = H * group
    bounds = None if cuts is None else [0, *sorted(cuts)]
    N = None if bounds is None else len(bounds) - 1
    B = 2 if bounds is None else 1
    args: dict[str, Any] = make(
        B, T, H, HV, K, V, gate=kind, dtype=dtype, initial=initial, sequences=N, state_v_first=v_first
    )
    if gate in ("softplus", "bounded"):
        args |= {"gate": gate, "A_log": torch.randn(HV, dtype=dtype), "gate_bound": -2.0}
        args["dt_bias"] = torch.randn(*((HV, K) if per_channel else (HV,)), dtype=dtype)
    if bounds is not None:
        args["cu_seqlens"] = torch.tensor(bounds)
    args |= {"use_qk_l2norm": l2norm, "beta_activation": activation, "state_v_first": v_first}
    # With few channels keys repeat; with few elements a sum over K and V terms of order one can cancel.
    factor = FLOAT32_REPEATED_FACTOR if dtype == torch.float32 else None
    check(args, only=only, factor=factor, scales=dict.fromkeys(("o", "final_state", *LEAVES), (K * V) ** 0.5))


# -------------------------------------------------------------------------------------------------- decode


def one_step(args: dict[str, Any], tokens: slice) -> dict[str, Any]:
    token_tensors = ("q", "k", "v", "beta", "g")
    return {n: t[:, tokens] if n in token_tensors else t for n, t in args.items() if n != "initial_state"}


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("m", [1, 3, 8])
@pytest.mark.parametrize("gate", [*GATE_KINDS, "head-softplus", "channel-bounded"])
def test_decode_is_prefill(gate: str, m: int, v_first: bool) -> None:
    kind, _, fused = gate.partition("-")
    args: dict[str, Any] = make(T=24, HV=4, gate=kind, state_v_first=v_first)
    options: dict[str, Any] = {"use_qk_l2norm": True, "beta_activation": "sigmoid2", "state_v_first": v_first}
    if fused:
        args["A_log"] = torch.randn(4, dtype=torch.float64)
        args["dt_bias"] = torch.randn(*((4, 24) if kind == "channel" else (4,)), dtype=torch.float64)
        options["gate"] = fused
    want, want_state = delta_rule(**args, **options, output_final_state=True)
    pool = args["initial_state"].clone()
    outputs = [
        delta_rule_step(**one_step(args, slice(t, t + m)), **options, state=pool) for t in range(0, 24, m)
    ]
    torch.testing.assert_close(torch.cat(outputs, 1), want, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(pool, want_state, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_decode_accuracy(dtype: torch.dtype, pool_dtype: torch.dtype) -> None:
    """One step from a pool of any dtype: float32 arithmetic, one rounding of the output and of the state."""
    args = make(T=4, gate="channel", dtype=dtype)
    pool = args["initial_state"].to(pool_dtype)
    wide = {n: t.double() for n, t in args.items()} | {"initial_state": pool.double()}
    want, want_state = delta_rule_reference(**wide, output_final_state=True)
    assert want_state is not None
    o = delta_rule_step(**one_step(args, slice(0, 4)), state=pool)
    assert o.dtype == dtype
    assert_accurate("o", o, want, want.to(dtype))
    assert_accurate("state", pool, want_state, want_state.to(pool_dtype), factor=4)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=name_of)
def test_decode_slots(index_dtype: torch.dtype) -> None:
    """Rows read and write the slots they name; inactive rows and untouched slots stay as they are."""
    args = make(B=4, T=2)
    states = torch.randn(8, 2, 24, 16, dtype=torch.float64)
    states[7] = math.nan
    pool = torch.full((8, 2, 24, 20), math.pi, dtype=torch.float64).flatten(1).as_strided(
        (8, 2, 24, 16), (2 * 24 * 20, 24 * 16, 16, 1)
    )  # fmt: skip
    pool.copy_(states)
    read = torch.tensor([5, -1, 0, 3], dtype=index_dtype)
    write = torch.tensor([5, 7, 6, -1], dtype=index_dtype)
    o = delta_rule_step(**one_step(args, slice(0, 2)), state=pool, read_idx=read, write_idx=write)
    active = [0, 2, 3]
    want, after = delta_rule(
        **{n: t[active] for n, t in args.items() if n != "initial_state"},
        initial_state=states[[5, 0, 3]],
        output_final_state=True,
    )
    torch.testing.assert_close(o[active], want, rtol=1e-12, atol=1e-12)
    assert (o[1] == 0).all()
    torch.testing.assert_close(pool[[5, 6]], after[:2], rtol=1e-12, atol=1e-12)
    kept = [0, 1, 2, 3, 4]
    assert torch.equal(pool[kept], states[kept])
    assert pool[7].isnan().all()
    padding = pool.as_strided((8, 2 * 24 * 4), (2 * 24 * 20, 1), 2 * 24 * 16)
    assert (padding == math.pi).all()


@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_decode_state_per_token(pool_dtype: torch.dtype) -> None:
    """With write_idx [B, T] slot (b, t) holds the state after token t: any accepted prefix can go on."""
    args = make(B=2, T=3, dtype=torch.float32)
    pool = torch.cat([args["initial_state"], torch.zeros(6, 2, 24, 16)]).to(pool_dtype)
    before = pool.clone()
    slots = torch.tensor([[2, 3, 4], [-1, 6, 7]])
    o = delta_rule_step(**one_step(args, slice(0, 3)), state=pool, write_idx=slots)
    for t in range(3):
        prefix = one_step(args, slice(0, t + 1)) | {"initial_state": before[:2].float()}
        want, state = delta_rule(**prefix, output_final_state=True)
        torch.testing.assert_close(o[:, : t + 1], want, rtol=1e-4, atol=1e-5)
        for b in range(2):
            if slots[b, t] >= 0:
                rtol, atol = (1e-2, 1e-2) if pool_dtype == torch.bfloat16 else (1e-4, 1e-5)
                torch.testing.assert_close(pool[slots[b, t]].float(), state[b], rtol=rtol, atol=atol)
    assert torch.equal(pool[[0, 1, 5]], before[[0, 1, 5]])


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_decode_hostile_gates(gate: str) -> None:
    args = make(T=4, gate=gate)
    args["g"][:, 1] = -math.inf
    args["g"][:, 2] = -1e4
    pool = args["initial_state"].clone()
    want, state = delta_rule_reference(**args, output_final_state=True)
    torch.testing.assert_close(delta_rule_step(**one_step(args, slice(0, 4)), state=pool), want)
    torch.testing.assert_close(pool, state)


# ------------------------------------------------------------------------------------- speculative decoding


def check_speculation(
    device: str, dtype: torch.dtype, pool_dtype: torch.dtype, gate: str, v_first: bool
) -> None:
    """Drafts of 1 to 8 tokens, of which any number is accepted, against the same tokens one by one: to the bit.

    Row 0 reads and writes slot 0, row 1 moves from slot to slot, row 2 is inactive at first.
    """
    kind, _, fused = gate.partition("-")
    drafts, accepted = [3, 8, 1, 5, 2], [[2, 3, 0], [8, 0, 0], [0, 1, 0], [5, 4, 3], [1, 2, 0]]
    args: dict[str, Any] = make(
        B=3, T=sum(drafts), HV=4, K=24, V=16, gate=kind, dtype=dtype, state_v_first=v_first
    )
    options: dict[str, Any] = {"use_qk_l2norm": True, "beta_activation": "sigmoid", "state_v_first": v_first}
    if fused:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        bias = torch.randn(*((4, 24) if kind == "channel" else (4,)), dtype=wide, device=device)
        options |= {"gate": fused, "A_log": torch.randn(4, dtype=wide, device=device), "dt_bias": bias}
    args = {n: t.to(device) for n, t in args.items()}
    states = torch.cat(
        [args.pop("initial_state"), torch.zeros(2, 4, *((16, 24) if v_first else (24, 16)), device=device)]
    )
    pool = states.to(pool_dtype, copy=True)
    plain = pool.to(states.dtype, copy=True)  # the states of the rows, of which row b is slot b

    def index(*slots: int) -> Tensor:
        return torch.tensor(slots, device=device)

    read = index(0, 1, -1)
    pending, kept = None, None
    start = 0
    for m, keep in zip(drafts, accepted, strict=True):
        draft = one_step(args, slice(start, start + m))
        write = index(0, 3 if int(read[1]) == 1 else 1, int(read[2]))
        o, after = delta_rule_verify(
            **draft, **options, state=pool, pending=pending, accepted=kept, read_idx=read,
            write_idx=None if pending is None else write,
        )  # fmt: skip
        if pending is not None:
            read = write
        slots = index(0, 1, 2)
        rows = plain.clone()
        want = delta_rule_step(**draft, **options, state=rows, read_idx=torch.where(read < 0, read, slots))
        assert torch.equal(o, want)
        for b, a in enumerate(keep):
            if a > 0 and read[b] >= 0:
                one = {n: t[b : b + 1, :a] for n, t in draft.items()}
                delta_rule_step(**one, **options, state=plain, read_idx=index(b))
        plain = plain.to(pool_dtype).to(plain.dtype)
        pending, kept = after, index(*keep)
        start += m
        if m == 1:  # commit, and go on without pending tokens, with row 2 from here on
            delta_rule_commit(pending, kept.int(), state=pool, read_idx=read, state_v_first=v_first)
            pending, kept = None, None
            read = index(0, int(read[1]), 2)
    delta_rule_commit(pending, kept, state=pool, read_idx=read, state_v_first=v_first)  # type: ignore[arg-type]
    for b, slot in enumerate(read.tolist()):
        assert torch.equal(pool[slot], plain[b].to(pool_dtype)), b


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("gate", [*GATE_KINDS, "head-softplus", "channel-bounded"])
def test_speculation(gate: str, pool_dtype: torch.dtype, v_first: bool) -> None:
    check_speculation("cpu", torch.float32, pool_dtype, gate, v_first)


def test_speculation_float64() -> None:
    check_speculation("cpu", torch.float64, torch.float64, "head", False)


def test_speculation_of_nothing_accepted_changes_nothing() -> None:
    args = make(T=4, dtype=torch.float32)
    pool = args["initial_state"].clone()
    draft = one_step(args, slice(0, 4))
    o, pending = delta_rule_verify(**draft, state=pool)
    assert torch.equal(pool, args["initial_state"])
    again, _ = delta_rule_verify(**draft, state=pool, pending=pending, accepted=torch.tensor([0, 0]))
    assert torch.equal(again, o)
    delta_rule_commit(pending, torch.tensor([0, 4]), state=pool)
    assert torch.equal(pool[0], args["initial_state"][0])
    assert not torch.equal(pool[1], args["initial_state"][1])


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"accepted": None}, ValueError, "pending is given, but accepted is None"),
        ({"pending": None}, ValueError, "accepted is given, but pending is None"),
        ({"accepted": torch.tensor([0, 5])}, RuntimeError, "accepted has 5, but there are 4 pending tokens"),
        ({"accepted": torch.tensor([-1, 0])}, RuntimeError, "accepted has -1"),
        ({"accepted": torch.tensor([1.0, 2.0])}, ValueError, "accepted has dtype torch.float32"),
        ({"accepted": torch.tensor([1])}, ValueError, r"accepted has shape \[1\], expected \[2\]"),
        (
            {"write_idx": torch.zeros(2, 4).long()},
            ValueError,
            r"write_idx has shape \[2, 4\], expected \[2\]",
        ),
        ({"g": None}, RuntimeError, r"pending g has shape \[2, 4, 2, 1\], expected \[2, 4, 2, 0\]"),
    ],
)
def test_bad_speculation(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    args = make(T=4, dtype=torch.float32)
    pool = args["initial_state"]
    draft = one_step(args, slice(0, 4))
    _, pending = delta_rule_verify(**draft, state=pool)
    call = draft | {"state": pool, "pending": pending, "accepted": torch.tensor([1, 2])}
    with pytest.raises(error, match=f"delta_.*verify: .*{message}"):
        delta_rule_verify(**call | changes)


def test_bad_commit() -> None:
    args = make(T=4, dtype=torch.float32)
    pool, kept = args["initial_state"], torch.tensor([1, 2])
    _, pending = delta_rule_verify(**one_step(args, slice(0, 4)), state=pool)
    with pytest.raises(RuntimeError, match=r"delta_commit: pending u has shape \[2, 3, 2, 16\]"):
        delta_rule_commit(PendingTokens(pending.k, pending.u[:, :3], pending.g), kept, state=pool)
    with pytest.raises(RuntimeError, match=r"delta_commit: state has shape \[2, 2, 24, 16\]"):
        delta_rule_commit(pending, kept, state=pool, state_v_first=True)


def test_speculation_opcheck_and_compile() -> None:
    args = make(T=3, dtype=torch.float32)
    pool, accepted = args.pop("initial_state"), torch.tensor([1, 3])
    draft = tuple(args[n] for n in ("q", "k", "v", "beta", "g"))
    _, pending = delta_rule_verify(*draft, state=pool)
    ops = torch.ops.nearfield
    rest = (None, None, 0.5, True, 1, 0, -5.0, False)
    torch.library.opcheck(ops.delta_verify.default, (*draft, pool, None, None, *pending, accepted, *rest))
    torch.library.opcheck(ops.delta_verify.default, (*draft, pool, None, None, None, None, None, None, *rest))
    torch.library.opcheck(ops.delta_commit.default, (pool, *pending, accepted, None, None, False))

    torch._dynamo.reset()
    plain, compiled = pool.clone(), pool.clone()

    def f(pool: Tensor) -> Tensor:
        o, after = delta_rule_verify(*draft, state=pool, pending=pending, accepted=accepted)
        delta_rule_commit(after, accepted, state=pool)
        return o

    assert torch.equal(torch.compile(f, backend="aot_eager", fullgraph=True)(compiled), f(plain))
    assert torch.equal(compiled, plain)


# ------------------------------------------------------------------------------------------------ bad input


BAD_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "q-rank": ({"q": torch.zeros(2, 8, 24)}, ValueError, r"q has shape \[2, 8, 24\]"),
    "k-shape": ({"k": torch.zeros(2, 8, 2, 20)}, ValueError, r"k has shape \[2, 8, 2, 20\]"),
    "v-tokens": ({"v": torch.zeros(2, 9, 2, 16)}, ValueError, r"v has shape \[2, 9, 2, 16\]"),
    "v-heads": ({"v": torch.zeros(2, 8, 3, 16)}, ValueError, "v has 3 heads, expected a multiple of q's 2"),
    "no-channels": ({"v": torch.zeros(2, 8, 2, 0)}, ValueError, "v has 0 channels"),
    "beta-shape": ({"beta": torch.zeros(2, 8)}, ValueError, r"beta has shape \[2, 8\]"),
    "g-shape": ({"g": torch.zeros(2, 8, 2, 16)}, ValueError, r"g has shape \[2, 8, 2, 16\]"),
    "k-dtype": ({"k": torch.zeros(2, 8, 2, 24).double()}, ValueError, "k has dtype torch.float64"),
    "q-dtype": ({"q": torch.zeros(2, 8, 2, 24).long()}, NotImplementedError, "q has dtype torch.int64"),
    "g-dtype": ({"g": torch.zeros(2, 8, 2).double()}, ValueError, "g has dtype torch.float64"),
    "beta-type": ({"beta": 0.5}, TypeError, "beta must be a torch.Tensor, got float"),
    "activation": (
        {"beta_activation": "tanh"},
        ValueError,
        "beta_activation is 'tanh'; supported: none, sigmoid",
    ),
    "gate-name": ({"gate": "exp"}, ValueError, "gate is 'exp'; supported: log, softplus, bounded"),
    "gate-without-g": ({"gate": "bounded", "g": None}, ValueError, "gate is 'bounded', but g is None"),
    "softplus-without-A": ({"gate": "softplus"}, ValueError, "needs A_log, but A_log is None"),
    "log-with-A": ({"A_log": torch.zeros(2)}, ValueError, "gate is 'log'"),
    "A-shape": ({"gate": "softplus", "A_log": torch.zeros(3)}, ValueError, r"A_log has shape \[3\]"),
    "bias-shape": (
        {"gate": "bounded", "dt_bias": torch.zeros(2, 24)},
        ValueError,
        r"dt_bias has shape \[2, 24\]",
    ),
    "bound": ({"gate": "bounded", "gate_bound": -7.0}, ValueError, "gate_bound is -7.0"),
    "device": ({"k": torch.zeros(2, 8, 2, 24, device="meta")}, ValueError, "k is on meta, but q is on cpu"),
}
BAD_FORWARD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "state-shape": (
        {"initial_state": torch.zeros(2, 2, 16, 24)},
        ValueError,
        r"initial_state has shape \[2, 2, 16, 24\]",
    ),
    "state-dtype": (
        {"initial_state": torch.zeros(2, 2, 24, 16).half()},
        ValueError,
        "initial_state has dtype torch.float16",
    ),
    "packed-batch": ({"cu_seqlens": torch.tensor([0, 8])}, ValueError, "q has batch 2"),
    "cu-dtype": ({"cu_seqlens": torch.tensor([0.0, 8.0])}, ValueError, "cu_seqlens has dtype torch.float32"),
    "cu-rank": ({"cu_seqlens": torch.tensor([[0, 8]])}, ValueError, r"cu_seqlens has shape \[1, 2\]"),
    "cu-empty": ({"cu_seqlens": torch.zeros(0).long()}, ValueError, r"cu_seqlens has shape \[0\]"),
}
BAD_STEP: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "pool-shape": ({"state": torch.zeros(2, 2, 16, 24)}, ValueError, r"state has shape \[2, 2, 16, 24\]"),
    "pool-dtype": ({"state": torch.zeros(2, 2, 24, 16).half()}, ValueError, "state has dtype torch.float16"),
    "few-slots": ({"state": torch.zeros(1, 2, 24, 16)}, ValueError, "state has 1 slots"),
    "read-shape": ({"read_idx": torch.zeros(3).long()}, ValueError, r"read_idx has shape \[3\]"),
    "write-shape": ({"write_idx": torch.zeros(2, 7).long()}, ValueError, r"write_idx has shape \[2, 7\]"),
    "index-dtype": ({"read_idx": torch.zeros(2)}, ValueError, "read_idx has dtype torch.float32"),
    "read-range": (
        {"read_idx": torch.tensor([0, 2])},
        RuntimeError,
        "read_idx has slot 2, but the pool has 2",
    ),
    "write-range": ({"write_idx": torch.tensor([0, 9])}, RuntimeError, "write_idx has slot 9"),
    "pool-strides": (
        {"state": torch.zeros(2, 2, 16, 24).transpose(-1, -2)},
        RuntimeError,
        r"state has strides \[768, 384, 1, 24\]",
    ),
    "requires-grad": ({"q": torch.zeros(2, 8, 2, 24, requires_grad=True)}, ValueError, "has no gradient"),
}


@pytest.mark.parametrize("name", [*BAD_CALLS, *BAD_FORWARD])
def test_bad_call(name: str) -> None:
    changes, error, message = (BAD_CALLS | BAD_FORWARD)[name]
    with pytest.raises(error, match=f"^delta_rule: .*{message}"):
        delta_rule(**make(T=8, dtype=torch.float32) | changes)


@pytest.mark.parametrize("name", [*BAD_CALLS, *BAD_STEP])
def test_bad_step(name: str) -> None:
    changes, error, message = (BAD_CALLS | BAD_STEP)[name]
    args = one_step(make(T=8, dtype=torch.float32), slice(0, 8)) | {"state": torch.zeros(2, 2, 24, 16)}
    with pytest.raises(error, match=f"delta_.*step: .*{message}"):
        delta_rule_step(**args | changes)


def test_step_length() -> None:
    with pytest.raises(ValueError, match="q has 9 tokens; supported: 1 to 8"):
        delta_rule_step(
            **one_step(make(T=9), slice(0, 9)), state=torch.zeros(2, 2, 24, 16, dtype=torch.float64)
        )


@pytest.mark.parametrize(
    "bounds, message",
    [
        ([1, 8], "starts with 1"),
        ([0, 5, 3, 8], "decreases from 5 to 3"),
        ([0, 9], "ends with 9, but there are 8"),
    ],
    ids=["start", "order", "end"],
)
def test_bad_sequence_bounds(bounds: list[int], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"cu_seqlens {message}"):
        delta_rule(**make(B=1, T=8, initial=False), cu_seqlens=torch.tensor(bounds))


def operator_arguments(args: dict[str, Any], **changes: Any) -> tuple[Any, ...]:
    values = args | changes
    names = ("q", "k", "v", "beta", "g", "initial_state", "A_log", "dt_bias", "cu_seqlens")
    gate = values.get("gate", 0)
    return (*(values.get(n) for n in names), 0.5, True, 1, gate, -3.0, False)


@pytest.mark.parametrize("name", ["k", "v", "beta", "g", "initial_state", "A_log", "dt_bias", "cu_seqlens"])
def test_operators_check_shapes_themselves(name: str) -> None:
    """A direct call cannot make the kernels read foreign memory."""
    args = make(B=1, T=8) | {"A_log": torch.zeros(2).double(), "dt_bias": torch.zeros(2).double()}
    wrong = (
        torch.zeros(0, dtype=torch.int64) if name == "cu_seqlens" else torch.zeros(1, 3, dtype=torch.float64)
    )
    message = "cu_seqlens is empty" if name == "cu_seqlens" else rf"{name} has shape \[1, 3\]"
    arguments = operator_arguments(args, gate=1, **{name: wrong})
    with pytest.raises(RuntimeError, match=f"delta_fwd: {message}"):
        torch.ops.nearfield.delta_fwd(*arguments, True)
    with pytest.raises(RuntimeError, match=f"delta_bwd: {message}"):
        torch.ops.nearfield.delta_bwd(None, None, *arguments)


# --------------------------------------------------------------------------------------- framework contract


def contract_cases() -> dict[str, dict[str, Any]]:
    torch.manual_seed(0)
    gated = make(T=20, gate="channel", dtype=torch.float32)
    packed = make(B=1, T=20, sequences=2, dtype=torch.bfloat16)
    return {
        "plain": make(T=20, gate="none", initial=False),
        "gated": gated | {"A_log": torch.randn(2), "dt_bias": torch.randn(48), "gate": 1},
        "packed": packed | {"cu_seqlens": torch.tensor([0, 7, 18])},
    }


@pytest.mark.parametrize("name", ["plain", "gated", "packed"])
def test_opcheck(name: str) -> None:
    args = contract_cases()[name]
    tensors = {
        n: t.requires_grad_() for n, t in args.items() if isinstance(t, Tensor) and t.is_floating_point()
    }
    arguments = operator_arguments(args | tensors)
    ops = torch.ops.nearfield
    torch.library.opcheck(ops.delta_fwd.default, (*arguments, True))
    torch.library.opcheck(ops.delta_fwd.default, (*arguments, False))
    torch.library.opcheck(ops.delta_fwd_kept.default, (*arguments, True))
    torch.library.opcheck(
        ops.delta_fwd_states.default,
        (*(a.detach() if isinstance(a, Tensor) else a for a in arguments), True, 1),
    )
    with torch.no_grad():
        o, state = ops.delta_fwd(*arguments, True)
    detached = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
    torch.library.opcheck(ops.delta_bwd.default, (o, state, *detached))
    torch.library.opcheck(ops.delta_bwd.default, (None, state, *detached))
    o, state, kept = ops.delta_fwd_kept(*detached, True)
    assert kept.shape == (0,)
    torch.library.opcheck(ops.delta_bwd.default, (o, state, *detached, None, kept))


def test_opcheck_step() -> None:
    args = make(T=2, dtype=torch.float32)
    pool = args.pop("initial_state")
    tensors = (
        args["q"],
        args["k"],
        args["v"],
        args["beta"],
        args["g"],
        pool,
        torch.tensor([1, -1]),
        None,
        None,
        None,
    )
    torch.library.opcheck(torch.ops.nearfield.delta_step.default, (*tensors, 0.5, True, 1, 0, -5.0, False))


def compiled_results(function: Any, args: dict[str, Any]) -> list[Tensor]:
    leaves = {n: t.clone().requires_grad_() for n, t in args.items() if t.is_floating_point()}
    o, state = function(**args | leaves)
    return [o, state, *torch.autograd.grad(o.square().sum() + state.square().sum(), list(leaves.values()))]


@pytest.mark.parametrize("backend, dynamic", [("aot_eager", False), ("aot_eager", True), ("inductor", False)])
def test_compile(backend: str, dynamic: bool) -> None:
    def function(**kw: Any) -> Any:
        return delta_rule(**kw, use_qk_l2norm=True, beta_activation="sigmoid", output_final_state=True)

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)
    for T in (40, 70) if dynamic else (40,):
        packed: dict[str, Any] = make(B=1, T=T, HV=4, gate="channel", sequences=2, dtype=torch.float32)
        packed["cu_seqlens"] = torch.tensor([0, 7, T - 3])
        got, want = compiled_results(compiled, packed), compiled_results(function, packed)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_compile_step() -> None:
    torch._dynamo.reset()
    args = make(T=3, dtype=torch.float32)
    pool, start = args.pop("initial_state"), torch.tensor([1, 0])
    want_pool = pool.clone()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(pool: Tensor, **kw: Tensor) -> Tensor:
        return delta_rule_step(**kw, state=pool, read_idx=start) + pool.sum()

    got = step(pool, **args)
    want = delta_rule_step(**args, state=want_pool, read_idx=start) + want_pool.sum()
    torch.testing.assert_close(got, want)
    assert torch.equal(pool, want_pool)


def test_autocast() -> None:
    """q, k and v are cast, as for attention; gates, write strengths and states keep their precision."""
    args = make(gate="channel", dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, state = delta_rule(**args, output_final_state=True)
        pool = args["initial_state"].clone()
        stepped = delta_rule_step(**one_step(args, slice(0, 4)), state=pool)
    assert o.dtype == stepped.dtype == torch.bfloat16
    assert state is not None
    assert state.dtype == torch.float32
    cast = args | {n: args[n].bfloat16() for n in ("q", "k", "v")}
    want, want_state = delta_rule(**cast, output_final_state=True)
    assert torch.equal(o, want)
    assert torch.equal(state, want_state)
    leaves = {n: t.clone().requires_grad_() for n, t in args.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = delta_rule(**leaves)[0].float().sum()
    loss.backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in leaves.values())


def test_no_grad() -> None:
    args = {n: t.requires_grad_() for n, t in make().items()}
    with torch.no_grad():
        o, _ = delta_rule(**args)
    assert not o.requires_grad


@pytest.mark.parametrize("gate", GATE_KINDS)
def test_recompute(gate: str) -> None:
    """The CPU computes the same either way, and says so for a gradient that was kept elsewhere."""
    args: dict[str, Any] = make(gate=gate, dtype=torch.float32)
    d_o, d_state = torch.randn(2, 100, 2, 16), torch.randn(2, 2, 24, 16)
    want = run(delta_rule, args, d_o, d_state, None)
    got = run(delta_rule, args | {"recompute": True}, d_o, d_state, None)
    assert all(torch.equal(got[name], value) for name, value in want.items())
    with pytest.raises(RuntimeError, match=r"kept has shape \[3\]"):
        torch.ops.nearfield.delta_bwd(
            None, d_state, *operator_arguments(args), None, torch.zeros(3, dtype=torch.uint8)
        )


def test_what_the_gradient_keeps() -> None:
    """The bytes that the docstring of delta_rule promises, and none where Hopper's kernels do not run."""
    q, v = (torch.empty(2, 130, h, d, dtype=torch.bfloat16, device="meta") for h, d in ((2, 64), (4, 136)))
    g = q.new_empty(2, 130, 4, 64)
    assert op.kept_bytes(q, v, None, None, None) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "_keeps_on", lambda *_: True)
        chunks = 2 * 3 * 4
        assert op.kept_bytes(q, v, None, None, None) == 64 * chunks * (284 + 6 * 192)
        assert op.kept_bytes(q, v, g, None, "hopper") == 64 * chunks * (284 + 6 * 192 + 1288)
        assert op.kept_bytes(q[:1], v[:1], g, torch.tensor([0, 3, 9]), None) == 64 * 4 * 4 * (
            284 + 1152 + 1288
        )
        assert op.kept_bytes(q, v, None, None, "portable") == 0
        assert op.kept_bytes(q[..., :60], v, None, None, None) == 0
        assert op.kept_bytes(q[:, :0], v[:, :0], None, None, None) == 0


def test_meta_tensors() -> None:
    args = {n: t.to("meta") for n, t in make(dtype=torch.bfloat16, HV=4).items()}
    o, state = delta_rule(**args, output_final_state=True)
    assert (o.shape, o.dtype) == ((2, 100, 4, 16), torch.bfloat16)
    assert state is not None
    assert (state.shape, state.dtype) == ((2, 4, 24, 16), torch.float32)


@pytest.mark.parametrize("gate", GATE_KINDS)
def test_deterministic(gate: str) -> None:
    """Bitwise, for repeated runs and for one or two threads; V = 144 is also split over the threads."""
    args: dict[str, Any] = make(B=1, T=150, H=1, HV=1, V=144, gate=gate, dtype=torch.float32)
    if gate != "none":
        args |= {"gate": "softplus", "A_log": torch.randn(1)}
    d_o, d_state = torch.randn(1, 150, 1, 144), torch.randn(1, 1, 24, 144)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 1, 2, 2):
            torch.set_num_threads(threads)
            runs.append(run(delta_rule, args, d_o, d_state, None))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(other[name], value) for name, value in runs[0].items())


def test_memory_is_linear() -> None:
    """T = 32768: a T x T buffer would take 4 GB."""
    args = make(B=1, T=32768, H=1, HV=1, K=8, V=8, dtype=torch.float32, gate="channel")
    leaves = {n: t.requires_grad_() for n, t in args.items()}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    delta_rule(**leaves)[0].sum().backward()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024


def test_exported() -> None:
    assert {"delta_rule", "delta_rule_step"} <= set(nearfield.__all__)
    assert nearfield.delta_rule is delta_rule
