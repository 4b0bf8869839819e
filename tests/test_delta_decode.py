"""Decoding with the delta rule: steps of a few tokens from a pool of states."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from compare import assert_accurate
from delta_cases import DTYPES, GATE_KINDS, make, name_of, one_step
from nearfield.delta import delta_rule, delta_rule_reference, delta_rule_step


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
