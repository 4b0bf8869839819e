"""The delta rule on inputs that are hard to compute with: strong gates, repeated keys, extreme write strengths."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from delta_cases import (
    FLOAT32_REPEATED_FACTOR,
    GATE_KINDS,
    check,
    correlated_keys,
    hostile_gates,
    make,
    name_of,
)
from nearfield.delta import delta_rule


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("beta_top", [1.0, 1.9])
@pytest.mark.parametrize("gate", GATE_KINDS)
@pytest.mark.parametrize("kind", ["identical", "plus-minus", "four-dimensional", "correlated"])
def test_repeated_keys(kind: str, gate: str, beta_top: float, dtype: torch.dtype) -> None:
    args = make(B=1, T=100, gate=gate, strength=0.01, dtype=dtype)
    args["k"] = correlated_keys(kind, args["k"].shape).to(dtype)
    args["beta"] = (beta_top * (0.9 + 0.1 * torch.rand(args["beta"].shape))).to(args["beta"].dtype)
    check(args, l2_factor=2, factor=FLOAT32_REPEATED_FACTOR if dtype == torch.float32 else None)
