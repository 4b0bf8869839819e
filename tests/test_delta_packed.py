"""The delta rule over packed sequences."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from delta_cases import GATE_KINDS, SEQUENCES, check, make, run
from nearfield.delta import delta_rule


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
