"""Gradients of the delta rule on CUDA against float64 on the same rounded inputs."""

from __future__ import annotations

import functools
import math
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from delta_cases import (
    L2_16BIT,
    LEAVES,
    SEQUENCES,
    correlated_keys,
    hostile_gates,
    kernels,
    make,
    name_of,
    repeated_keys,
    run,
)
from delta_chunks import delta_rule_by_chunks
from nearfield.delta import delta_rule, delta_rule_reference
from nearfield.delta.op import kept_bytes
from torch import Tensor, nn

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16]
GATE_KINDS = ("none", "head", "channel")


@pytest.fixture(autouse=True, params=["hopper", "hopper-recompute", "portable"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs on both backends, on Hopper's also without what the forward keeps."""
    name, _, recompute = request.param.partition("-")
    rule = functools.partial(delta_rule, backend=name, recompute=bool(recompute))
    monkeypatch.setattr(sys.modules[__name__], "delta_rule", rule)
    return str(name)


def cuda(args: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() if isinstance(value, Tensor) else value for name, value in args.items()}


def output_gradients(args: dict[str, Any], only: str | None = None) -> list[Tensor | None]:
    """Random gradients of o and of the final state (``only`` "o" or "state")."""
    B, T, HV, V = args["v"].shape
    K, cu = args["q"].shape[-1], args.get("cu_seqlens")
    sizes = (V, K) if args.get("state_v_first") else (K, V)
    d_o = torch.randn(B, T, HV, V, device="cuda").to(args["q"].dtype)
    d_state = torch.randn(B if cu is None else len(cu) - 1, HV, *sizes, device="cuda")
    return [None if only == "state" else d_o, None if only == "o" else d_state]


def check(args: dict[str, Any], *, factor: float = 1.0, only: str | None = None) -> dict[str, Tensor]:
    """The gradients of delta_rule(**args) within the family's tolerance of float64.

    Where a gradient is a difference that cancels, they may be twice as far off as the token recurrence in q's dtype.
    """
    args = cuda(args)
    upstream = output_gradients(args, only)
    got = run(delta_rule, args, *upstream, None)
    truth = run(delta_rule_by_chunks, args, *upstream, torch.float64)
    eager: dict[str, Tensor] = {}
    # Under strong gates dg and d_initial are less than the rounding of the float64 sums they come from.
    resolution = 1e-14 * max(float(truth[name].norm()) for name in LEAVES if name in truth)
    for name in LEAVES:
        if args.get(name) is None:
            continue
        assert got[name].dtype == args[name].dtype
        assert got[name].shape == truth[name].shape
        assert got[name].isfinite().all(), f"d{name} is not finite"
        error, norm = float((got[name].double() - truth[name]).norm()), float(truth[name].norm())
        allowed = factor * L2_16BIT.get(name, 1e-2) * norm + resolution
        if error > allowed:
            eager = eager or run(delta_rule_reference, args, *upstream, args["q"].dtype)
            allowed = max(allowed, 2 * float((eager[name].double() - truth[name]).norm()))
        assert error <= allowed, f"d{name}: L2 error {error:.3g}, norm {norm:.3g}, allowed {allowed:.3g}"
    return got


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ----------------------------------------------------------------------------------- shapes, lengths, options


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("gate", GATE_KINDS)
@pytest.mark.parametrize(
    "dims", [(128, 128), (64, 64), (64, 128), (128, 64), (72, 40), (8, 8), (128, 256), (64, 136)]
)
def test_head_dims(dims: tuple[int, int], gate: str, dtype: torch.dtype) -> None:
    check(make(B=2, T=200, H=2, HV=2, K=dims[0], V=dims[1], gate=gate, dtype=dtype))


@pytest.mark.parametrize("gate", GATE_KINDS)
@pytest.mark.parametrize("T", [1, 15, 63, 64, 65, 127, 1000])
def test_lengths(T: int, gate: str) -> None:
    for initial in (True, False):
        check(make(B=2, T=T, K=128, V=128, gate=gate, dtype=torch.bfloat16, initial=initial))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [(9, 1000), (16, 4500)], ids=["whole", "cut"])
def test_kept_by_clusters(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Sequences that clusters of CTAs prepare and walk over; more of them than clusters are cut."""
    H, T = shape
    check(make(B=2, T=T, H=H, HV=H, K=128, V=128, strength=0.1, dtype=dtype))


@pytest.mark.parametrize("backend", ["hopper"], indirect=True)
@pytest.mark.parametrize(("shape", "repeated", "gate", "dtype"), [
    ((1, 31, 128, 128, 7013), slice(0), "none", torch.bfloat16),
    ((1, 31, 128, 128, 7013), slice(1000), "head", torch.bfloat16),
    ((1, 31, 128, 128, 7013), slice(0), "head", torch.float16),
    ((31, 1, 64, 72, 7013), slice(290, 460), "head", torch.bfloat16),
], ids=str)  # fmt: skip
def test_kept_beside_clusters(
    backend: str, shape: tuple[int, ...], repeated: slice, gate: str, dtype: torch.dtype
) -> None:
    """What the last heads keep, for which no cluster is left, lies among what the others keep."""
    B, H, K, V, T = shape
    args = repeated_keys(repeated, B=B, T=T, H=H, HV=H, K=K, V=V, gate=gate, dtype=dtype)
    # K = 64: as many tokens in a chunk as key channels, so keys are correlated.
    check(args, factor=2 if repeated.stop or K == 64 else 1)
    args = cuda(args)
    args["q"].requires_grad_()
    names = [event.name for event in kernels(lambda: delta_rule(**args))]
    for kernel in ("head_cluster", "prepare", "state_pass"):
        assert any(kernel in name for name in names)
    first = delta_rule(**args)
    for _ in range(3):
        assert torch.equal(first[0], delta_rule(**args)[0])


@pytest.mark.parametrize("gate", ["head", "channel"])
@pytest.mark.parametrize("HV", [1, 2, 4, 8])
def test_grouped_value_heads(HV: int, gate: str) -> None:
    args: dict[str, Any] = make(B=2, T=200, H=1, HV=HV, K=128, V=64, gate=gate, dtype=torch.bfloat16)
    check(args)
    check(args | {"use_qk_l2norm": True})


@pytest.mark.parametrize("gate", GATE_KINDS)
def test_blocks_of_values(gate: str) -> None:
    """More than 128 values: the chunk gradient is a sum over blocks of them."""
    args: dict[str, Any] = make(B=1, T=150, HV=4, K=128, V=192, gate=gate, sequences=2, dtype=torch.bfloat16)
    args["cu_seqlens"] = torch.tensor([0, 70, 140])
    args |= {"use_qk_l2norm": True, "beta_activation": "sigmoid"}
    if gate != "none":
        sizes = args["g"].shape[2:]
        args |= {"gate": "softplus", "A_log": 0.5 * torch.randn(4), "dt_bias": torch.randn(sizes)}
    check(args)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("gate", ["head", "channel"])
@pytest.mark.parametrize("activation", ["none", "sigmoid", "sigmoid2"])
def test_fused_norm_and_beta(activation: str, gate: str, dtype: torch.dtype) -> None:
    args: dict[str, Any] = make(T=200, HV=4, K=128, V=128, gate=gate, dtype=dtype)
    args["q"], args["k"] = 3 * args["q"], 5 * args["k"]
    if activation != "none":
        args["beta"] = 3 * torch.randn(args["beta"].shape)
    check(args | {"use_qk_l2norm": True, "beta_activation": activation})


@pytest.mark.parametrize("K", [128, 72])
@pytest.mark.parametrize("gate", ["head", "channel"])
@pytest.mark.parametrize("option", ["softplus", "softplus-bias", "bounded", "bounded-A", "bounded-A-bias"])
def test_fused_gates(option: str, gate: str, K: int) -> None:
    args: dict[str, Any] = make(T=200, HV=4, K=K, V=128, gate=gate, dtype=torch.bfloat16)
    args["g"] = torch.randn(args["g"].shape)
    args["gate"] = option.split("-")[0]
    if "softplus" in option or "A" in option:
        args["A_log"] = 0.5 * torch.randn(4)
    if "bias" in option:
        args["dt_bias"] = torch.randn(args["g"].shape[2:])
    args["gate_bound"] = -3.0
    check(args)


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_small_tensors_in_16_bit(gate: str) -> None:
    args = make(T=200, K=128, V=128, gate=gate, dtype=torch.bfloat16)
    args["beta"], args["g"] = args["beta"].bfloat16(), args["g"].bfloat16()
    check(args)


def test_state_v_first() -> None:
    args = make(T=130, K=64, V=72, dtype=torch.bfloat16, state_v_first=True)
    check(args | {"state_v_first": True})


def test_scale() -> None:
    check(make(T=130, K=128, V=128, dtype=torch.bfloat16) | {"scale": -0.7})


@pytest.mark.parametrize("only", ["o", "state"])
@pytest.mark.parametrize("gate", GATE_KINDS)
def test_one_output_gradient(gate: str, only: str) -> None:
    check(make(T=130, K=128, V=128, gate=gate, dtype=torch.bfloat16), only=only)


def test_no_tokens() -> None:
    args = cuda(make(T=0, dtype=torch.bfloat16))
    upstream = output_gradients(args)
    got = run(delta_rule, args, *upstream, None)
    assert torch.equal(got["initial_state"], upstream[1])


# ------------------------------------------------------------------------------------------- packed sequences


@pytest.mark.parametrize("gate", GATE_KINDS)
@pytest.mark.parametrize("bounds", SEQUENCES.values(), ids=SEQUENCES.keys())
def test_packed(bounds: list[int], gate: str) -> None:
    """Packed equals the reference and, bit by bit, separate calls; padding full of NaN gets no gradient."""
    N, T = len(bounds) - 1, bounds[-1] + 7
    args: dict[str, Any] = make(B=1, T=T, HV=4, K=128, V=128, gate=gate, sequences=N, dtype=torch.bfloat16)
    args = cuda(args | {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)})
    check(args)
    upstream = output_gradients(args)
    want = run(delta_rule, args, *upstream, None)
    dirty = {n: t.clone() for n, t in args.items()}
    d_o, d_state = upstream
    assert d_o is not None
    assert d_state is not None
    for t in (*(dirty[n] for n in ("q", "k", "v", "beta", "g") if n in dirty), d_o):
        t[:, bounds[-1] :] = math.nan
    assert_same(run(delta_rule, dirty, d_o, d_state, None), want)
    for name in ("q", "k", "v", "beta"):
        assert (want[name][:, bounds[-1] :] == 0).all()
    for n, (start, end) in enumerate(pairwise(bounds)):
        one = {x: args[x][:, start:end] for x in args if x not in ("initial_state", "cu_seqlens")}
        one["initial_state"] = args["initial_state"][n : n + 1]
        got = run(delta_rule, one, d_o[:, start:end], d_state[n : n + 1], None)
        assert torch.equal(got.pop("initial_state"), want["initial_state"][n : n + 1])
        for name in got.keys() & {"q", "k", "v", "beta", "g"}:
            assert torch.equal(got[name], want[name][:, start:end]), name


# ------------------------------------------------------------------------------------------------ edge cases


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("gate", ["head", "channel"])
@pytest.mark.parametrize("kind", ["0", "-1e-6", "-5", "-50", "-1e4", "-inf", "mixed", "rare-inf", "one-inf"])
def test_hostile_gates(kind: str, gate: str, dtype: torch.dtype) -> None:
    args = make(B=1, T=500, K=128, V=128, gate=gate, dtype=dtype)
    args["g"] = hostile_gates(kind, args["g"].shape)
    got = check(args)
    if kind == "-inf":
        assert (got["g"] == 0).all()
        assert (got["initial_state"] == 0).all()


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_first_gate_without_a_state_has_no_gradient(gate: str) -> None:
    got = check(make(T=100, K=128, V=128, gate=gate, initial=False, dtype=torch.bfloat16))
    assert (got["g"][:, 0] == 0).all()


def test_zero_gates_are_no_gates() -> None:
    args = cuda(make(T=200, K=128, V=128, dtype=torch.bfloat16))
    args["g"] = torch.zeros_like(args["g"])
    upstream = output_gradients(args)
    gated = run(delta_rule, args, *upstream, None)
    del args["g"], gated["g"]
    assert_same(gated, run(delta_rule, args, *upstream, None))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("gate", ["none", "channel"])
@pytest.mark.parametrize("beta", [0.0, 1e-6, 1.0, 1.99])
def test_constant_beta(beta: float, gate: str, dtype: torch.dtype) -> None:
    args = make(T=300, K=128, V=128, gate=gate, dtype=dtype)
    args["beta"] = torch.full_like(args["beta"], beta)
    check(args, factor=2)


# Chunks with and without a write strength so small that dv no longer tells what multiplies it.
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("gate", ["none", "head"])
@pytest.mark.parametrize("least", [0.0, 1e-12, 1e-8])
def test_few_tiny_betas(least: float, gate: str, dtype: torch.dtype) -> None:
    args = make(T=500, K=128, V=128, gate=gate, dtype=dtype)
    for row in (70, 130, 191, 320):
        args["beta"][:, row] = least
    check(args)


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_zero_rows(gate: str) -> None:
    args: dict[str, Any] = make(T=100, K=128, V=128, gate=gate, dtype=torch.bfloat16)
    args["q"][:, 10:20] = 0
    args["k"][:, 15:70] = 0
    check(args | {"use_qk_l2norm": True})


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("gate", ["head", "channel"])
@pytest.mark.parametrize("beta_top", [1.0, 1.9])
@pytest.mark.parametrize("kind", ["identical", "plus-minus", "four-dimensional", "correlated"])
def test_repeated_keys(
    request: pytest.FixtureRequest, backend: str, kind: str, beta_top: float, gate: str, dtype: torch.dtype
) -> None:
    if (backend, kind, beta_top, gate, dtype) == ("hopper", "identical", 1.9, "channel", torch.float16):
        reason = "N and dV' rounded once to float16: dbeta 2.8 % where eager allows 2.77 %"
        request.applymarker(pytest.mark.xfail(reason=reason))
    args = make(B=1, T=300, K=128, V=128, gate=gate, strength=0.01, dtype=dtype)
    args["k"] = correlated_keys(kind, args["k"].shape).to(dtype)
    args["beta"] = beta_top * (0.9 + 0.1 * torch.rand(args["beta"].shape))
    check(args, factor=2)


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_initial_states(gate: str) -> None:
    """None is zero, bit by bit; a large one."""
    args = cuda(make(T=200, K=128, V=128, gate=gate, strength=0.05, dtype=torch.bfloat16))
    upstream = output_gradients(args)
    zero = run(delta_rule, args | {"initial_state": torch.zeros_like(args["initial_state"])}, *upstream, None)
    none = run(delta_rule, {n: t for n, t in args.items() if n != "initial_state"}, *upstream, None)
    assert_same(none, {n: t for n, t in zero.items() if n != "initial_state"})
    args["initial_state"] *= 100
    check(args)


def test_strides() -> None:
    """Storage that is read in place and storage that must be copied: same bits."""
    args = cuda(make(B=2, T=70, H=2, HV=4, K=64, V=64, dtype=torch.bfloat16))
    d_o, d_state = output_gradients(args)
    assert d_o is not None
    want = run(delta_rule, args, d_o, d_state, None)
    moved = dict(args)
    moved["q"] = args["q"].transpose(1, 2).contiguous().transpose(1, 2)
    moved["k"] = torch.cat([args["k"], args["k"]], -1)[..., 1:65].copy_(args["k"])  # not on 16 bytes
    moved["v"] = torch.cat([args["v"], torch.full_like(args["v"], math.nan)], -1)[..., :64]
    d_moved = d_o.transpose(1, 2).contiguous().transpose(1, 2)
    leaves = {n: moved[n].detach().requires_grad_() for n in args}
    o, state = delta_rule(**leaves, output_final_state=True)
    grads = torch.autograd.grad([o, state], list(leaves.values()), [d_moved, d_state])
    for name, grad in zip(leaves, grads, strict=True):
        assert torch.equal(grad, want[name]), name


# ----------------------------------------------------------------------------------------- framework contract


@pytest.mark.parametrize("gate", ["head", "channel"])
@pytest.mark.parametrize("H", [2, 96])
def test_bitwise_repeatable(H: int, gate: str) -> None:
    args = cuda(make(B=2, T=500, H=H, HV=2 * H, K=128, V=128, gate=gate, dtype=torch.bfloat16))
    upstream = output_gradients(args)
    first = run(delta_rule, args, *upstream, None)
    for _ in range(10):
        assert_same(run(delta_rule, args, *upstream, None), first)


# Long enough that chunks no longer wait for the walk, and enough heads that two of them share an SM: then shared
# memory is slow to read, and what was told to be read too early is overwritten before it is.
@pytest.mark.parametrize("gate", GATE_KINDS)
def test_bitwise_repeatable_on_a_full_gpu(gate: str) -> None:
    args = cuda(make(B=4, T=2048, H=16, HV=16, K=128, V=128, gate=gate, strength=0.1, dtype=torch.bfloat16))
    upstream = output_gradients(args)
    first = run(delta_rule, args, *upstream, None)
    for _ in range(5):
        assert_same(run(delta_rule, args, *upstream, None), first)


def operands(args: dict[str, Any], d_o: Tensor | None, d_state: Tensor | None) -> tuple[Any, ...]:
    names = ("q", "k", "v", "beta", "g", "initial_state", "A_log", "dt_bias", "cu_seqlens")
    return (d_o, d_state, *(args.get(n) for n in names), 0.1, False, 0, 0, -5.0, False)


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_side_stream_and_graph(gate: str) -> None:
    args = cuda(make(B=1, T=500, H=4, HV=4, K=128, V=128, gate=gate, dtype=torch.bfloat16))
    inputs = operands(args, *output_gradients(args))
    want = torch.ops.nearfield.delta_bwd(*inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        got = torch.ops.nearfield.delta_bwd(*inputs)
        assert not stream.query(), "the launch waited for the stream"
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.ops.nearfield.delta_bwd(*inputs)
    for t in captured:
        t.fill_(math.nan)
    graph.replay()
    for a, b, c in zip(want, got, captured, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("gate", GATE_KINDS)
def test_graph_of_forward_and_gradient(gate: str) -> None:
    args = cuda(make(B=1, T=500, H=4, HV=4, K=128, V=128, gate=gate, dtype=torch.bfloat16))
    d_o, _ = output_gradients(args)
    assert d_o is not None
    leaves = {n: t.requires_grad_() for n, t in args.items()}

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(delta_rule(**leaves)[0], list(leaves.values()), d_o)

    want = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for t in captured:
        t.detach().fill_(math.nan)
    for _ in range(2):
        graph.replay()
        for a, b in zip(want, captured, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "K, V, gate, bounds, backend_name",
    [
        (128, 128, "none", None, None),
        (128, 128, "channel", None, "hopper"),
        (64, 200, "head", [0, 70, 70, 190], None),
        (8, 8, "channel", [0, 3], None),
        (64, 264, "head", None, "hopper"),  # the forward is there, the gradient is not
        (136, 64, "head", None, None),
        (60, 64, "head", None, None),
        (64, 64, "head", None, "portable"),
    ],
)
def test_kept_for_the_gradient(
    K: int, V: int, gate: str, bounds: list[int] | None, backend_name: str | None
) -> None:
    """The operator keeps as many bytes as its fake kernel says, and the gradients are those without them."""
    packed = {} if bounds is None else {"cu_seqlens": torch.tensor(bounds)}
    N = 1 if bounds is None else len(bounds) - 1
    args = cuda(make(B=1, T=200, H=2, HV=4, K=K, V=V, gate=gate, sequences=N, dtype=torch.bfloat16) | packed)
    upstream = output_gradients(args)
    inputs = operands(args, *upstream)
    o, state, kept = torch.ops.nearfield.delta_fwd_kept(*inputs[2:], True, backend_name)
    want_o, want_state = torch.ops.nearfield.delta_fwd(*inputs[2:], True, backend_name)
    torch.testing.assert_close(o, want_o, rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(state, want_state, rtol=2e-2, atol=2e-3)
    g, cu = args.get("g"), args.get("cu_seqlens")
    assert kept.numel() == kept_bytes(args["q"], args["v"], g, cu, backend_name)
    if not kept.numel():
        assert V > 256 or K % 8 or K > 128 or backend_name == "portable"
        return
    got = torch.ops.nearfield.delta_bwd(*inputs, backend_name, kept)
    for a, b in zip(got, torch.ops.nearfield.delta_bwd(*inputs, backend_name), strict=True):
        assert float((a - b).float().norm()) <= 1e-2 * float(b.float().norm())
    with pytest.raises(RuntimeError, match="kept"):
        torch.ops.nearfield.delta_bwd(*inputs, backend_name, kept[1:])
    with pytest.raises(RuntimeError, match="kept"):
        torch.ops.nearfield.delta_bwd(*inputs, "portable", kept)
    torch.library.opcheck(
        torch.ops.nearfield.delta_fwd_kept.default,
        (*inputs[2:], True, backend_name),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_compile_and_opcheck(gate: str) -> None:
    args = cuda(make(B=1, T=200, H=2, HV=4, K=128, V=128, gate=gate, sequences=2, dtype=torch.bfloat16))
    args["cu_seqlens"] = torch.tensor([0, 70, 190], device="cuda")
    upstream = output_gradients(args)
    torch._dynamo.reset()
    compiled = torch.compile(delta_rule, fullgraph=True)
    assert_same(run(compiled, args, *upstream, None), run(delta_rule, args, *upstream, None))
    torch.library.opcheck(
        torch.ops.nearfield.delta_bwd.default,
        operands(args, *upstream),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_what_is_not_built_is_refused(backend: str) -> None:
    """By Hopper's kernels; without a name the portable ones serve it."""
    args = cuda(make(T=9, K=64, V=264, dtype=torch.bfloat16))
    if backend == "portable":
        check(args)
        return
    inputs = operands(args, *output_gradients(args))
    with pytest.raises(RuntimeError, match="up to 128 and 256"):
        torch.ops.nearfield.delta_bwd(*inputs, backend)
    assert len(torch.ops.nearfield.delta_bwd(*inputs)) == 8


# ------------------------------------------------------------------------------------------------- training


class Mixer(nn.Module):
    """Two residual layers of a delta rule, computed by ``rule``; ``gates``: log decays per head."""

    def __init__(self, rule: Any, dtype: torch.dtype, gates: int, width: int = 64, heads: int = 2) -> None:
        super().__init__()
        self.rule, self.dtype, self.gates, self.heads, self.width = rule, dtype, gates, heads, width
        self.into = nn.ModuleList(nn.Linear(width, 3 * width + (1 + gates) * heads) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.A_log, self.dt_bias = (
            nn.Parameter(torch.zeros(2, heads)),
            nn.Parameter(torch.zeros(2, heads * gates)),
        )

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        for i in range(2):
            *qkv, b, a = self.into[i](x).split([D, D, D, self.heads, self.gates * self.heads], -1)
            q, k, v = (t.reshape(B, T, self.heads, -1).to(self.dtype) for t in qkv)
            gate: dict[str, Any] = {}
            if self.gates:
                a = a if self.gates == 1 else a.reshape(B, T, self.heads, -1)
                gate = {"g": a, "gate": "softplus", "A_log": self.A_log[i], "dt_bias": self.dt_bias[i]}
            o, _ = self.rule(q=q, k=k, v=v, beta=b, use_qk_l2norm=True, beta_activation="sigmoid", **gate)
            x = x + self.out[i](o.reshape(B, T, D).to(x.dtype))
        return x


@pytest.mark.parametrize("gates", [0, 1, 32], ids=["DeltaNet", "GDN", "KDA"])
def test_training_follows_float32(gates: int) -> None:
    """300 steps towards a teacher: the loss stays within 1 % of training with the float32 reference."""
    torch.manual_seed(1)
    teacher = Mixer(delta_rule_by_chunks, torch.float32, gates).cuda()
    models = [Mixer(delta_rule, torch.bfloat16, gates), Mixer(delta_rule_by_chunks, torch.float32, gates)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.Adam(model.cuda().parameters(), lr=3e-3) for model in models]
    history = []
    for _ in range(300):
        x = torch.randn(4, 100, 64, device="cuda")
        with torch.no_grad():
            target = teacher(x)
        losses = [F.mse_loss(model(x), target) for model in models]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        history.append(torch.stack(losses).detach())
    ours, reference = torch.stack(history).reshape(10, 30, 2).mean(1).T
    assert reference[-1] < 0.5 * reference[0], "nothing was learned"
    assert ((ours - reference).abs() <= 0.01 * reference).all(), f"{ours} against {reference}"
