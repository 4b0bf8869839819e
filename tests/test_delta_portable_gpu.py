"""What only the portable kernels of the delta rule serve: float32, any head dims, gradients of all of that."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from delta_cases import (
    FLOAT32_FACTOR,
    FLOAT32_REPEATED_FACTOR,
    L2_16BIT,
    correlated_keys,
    hostile_gates,
    make,
    name_of,
    run,
)
from delta_chunks import delta_rule_by_chunks
from nearfield import explain
from nearfield.delta import delta_rule, delta_rule_reference, delta_rule_states
from torch import Tensor

pytestmark = pytest.mark.gpu

GATE_KINDS = ("none", "head", "channel")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(args: dict[str, Any], *, factor: float = FLOAT32_FACTOR) -> dict[str, Tensor]:
    """Results and gradients within `factor` of the recurrence's own error in float32, or in 16 bit the family's."""
    args = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in args.items()}
    dtype = args["q"].dtype
    B, _, HV, V = args["v"].shape
    cu, K = args.get("cu_seqlens"), args["q"].shape[-1]
    sizes = (V, K) if args.get("state_v_first") else (K, V)
    d_o = torch.randn(args["v"].shape, device="cuda").to(dtype)
    d_state = torch.randn(B if cu is None else len(cu) - 1, HV, *sizes, device="cuda")
    got = run(delta_rule, args, d_o, d_state, None)
    truth = run(delta_rule_by_chunks, args, d_o, d_state, torch.float64)
    eager = run(delta_rule_reference, args, d_o, d_state, dtype)
    chunks: dict[str, Tensor] = {}
    resolution = 1e-14 * max(float(t.norm()) for t in truth.values())
    for name, true in truth.items():
        assert got[name].isfinite().all(), f"{name} is not finite"
        norm, error = float(true.norm()), float((got[name].double() - true).norm())
        allowed = factor * float((eager[name].double() - true).norm())
        if dtype == torch.float32:
            allowed += 2.0**-22 * norm  # where the recurrence is exact, a few roundings
        else:
            allowed = max(allowed, L2_16BIT.get(name, 1e-2) * norm)
        if error > allowed + resolution and dtype == torch.float32:
            # Beside the same chunks in float32: three products of tf32 numbers keep 22 of its 24 bits.
            chunks = chunks or run(delta_rule_by_chunks, args, d_o, d_state, dtype)
            allowed = max(allowed, 4 * float((chunks[name].double() - true).norm()) + 2.0**-22 * norm)
        assert error <= allowed + resolution, (
            f"{name}: L2 error {error:.3g}, norm {norm:.3g}, allowed {allowed:.3g}"
        )
    return got


@pytest.mark.parametrize("gate", GATE_KINDS)
@pytest.mark.parametrize(
    "dims", [(128, 128), (64, 64), (72, 40), (37, 70), (256, 256), (130, 20), (1, 3), (200, 300)]
)
def test_float32_head_dims(dims: tuple[int, int], gate: str) -> None:
    # A key of one channel is 1 or -1: all keys repeat.
    factor = FLOAT32_REPEATED_FACTOR if dims[0] == 1 else FLOAT32_FACTOR
    check(make(B=2, T=150, H=2, HV=4, K=dims[0], V=dims[1], gate=gate, dtype=torch.float32), factor=factor)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("gate", GATE_KINDS)
@pytest.mark.parametrize("dims", [(256, 256), (37, 70), (100, 129)])
def test_dims_that_hopper_lacks(dims: tuple[int, int], gate: str, dtype: torch.dtype) -> None:
    check(make(B=2, T=150, H=1, HV=2, K=dims[0], V=dims[1], gate=gate, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("gate", ["head", "channel"])
@pytest.mark.parametrize("option", ["softplus", "softplus-bias", "bounded", "bounded-A", "bounded-A-bias"])
def test_fused(option: str, gate: str, dtype: torch.dtype) -> None:
    args: dict[str, Any] = make(T=200, HV=4, K=72, V=64, gate=gate, dtype=dtype)
    args["g"], args["beta"] = torch.randn(args["g"].shape), torch.randn(args["beta"].shape)
    args |= {
        "gate": option.split("-")[0],
        "gate_bound": -3.0,
        "use_qk_l2norm": True,
        "beta_activation": "sigmoid2",
    }
    if "softplus" in option or "A" in option:
        args["A_log"] = 0.5 * torch.randn(4)
    if "bias" in option:
        args["dt_bias"] = torch.randn(*((4, 72) if gate == "channel" else (4,)))
    check(args)


@pytest.mark.parametrize("gate", GATE_KINDS)
@pytest.mark.parametrize("v_first", [False, True])
def test_packed(v_first: bool, gate: str) -> None:
    args: dict[str, Any] = make(
        B=1, T=300, HV=4, K=64, V=72, gate=gate, sequences=5, dtype=torch.float32, state_v_first=v_first
    )
    cu = torch.tensor([0, 70, 70, 71, 200, 293], dtype=torch.int32)
    check(args | {"cu_seqlens": cu, "state_v_first": v_first})


@pytest.mark.parametrize("gate", GATE_KINDS)
@pytest.mark.parametrize("kind", ["identical", "plus-minus", "four-dimensional", "correlated"])
def test_repeated_keys(kind: str, gate: str) -> None:
    args = make(B=1, T=300, K=64, V=64, gate=gate, strength=0.01, dtype=torch.float32)
    args["k"] = correlated_keys(kind, args["k"].shape).float()
    args["beta"] = 1.9 * (0.9 + 0.1 * torch.rand(args["beta"].shape))
    check(args, factor=FLOAT32_REPEATED_FACTOR)


@pytest.mark.parametrize("kind", ["-inf", "-50", "mixed", "rare-inf", "one-inf"])
def test_hostile_channel_gates(kind: str) -> None:
    args = make(B=1, T=300, K=64, V=64, gate="channel", dtype=torch.bfloat16)
    args["g"] = hostile_gates(kind, args["g"].shape)
    got = check(args)
    if kind == "-inf":
        assert (got["g"] == 0).all()
        assert (got["initial_state"] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_states_on_the_way(dtype: torch.dtype) -> None:
    """Those of calls that end there, bit by bit; packed sequences have their own."""
    args = {n: t.cuda() for n, t in make(B=2, T=300, K=44, V=40, dtype=dtype).items()}
    _, final, states = delta_rule_states(**args, every=2, backend="portable")
    assert states.shape == (2, 2, 2, 44, 40)
    for i in range(2):
        part = {n: t if n == "initial_state" else t[:, : 128 * (i + 1)] for n, t in args.items()}
        assert torch.equal(delta_rule(**part, output_final_state=True, backend="portable")[1], states[:, i])
    assert torch.equal(delta_rule(**args, output_final_state=True, backend="portable")[1], final)


def test_repeatable_and_graph() -> None:
    args = {n: t.cuda() for n, t in make(T=300, K=100, V=60, gate="channel", dtype=torch.float32).items()}
    first = delta_rule(**args)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = delta_rule(**args)[0]
    graph.replay()
    assert torch.equal(captured, first)


def test_slower_kernels_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    args = {n: t.cuda() for n, t in make(T=9, K=44, V=16, dtype=torch.bfloat16).items()}
    with caplog.at_level(logging.WARNING, logger="nearfield"):
        for _ in range(2):
            delta_rule(**args)
    hopper = torch.cuda.get_device_capability() == (9, 0)
    told = [r.message for r in caplog.records if "portable" in r.message]
    assert len(told) == (2 if hopper else 0)  # forward and gradient
    if hopper:
        assert "portable" in str(explain(delta_rule, **args))
