"""Speculative decoding with the delta rule: drafts, of which a part is accepted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from delta_cases import GATE_KINDS, check_speculation, make, name_of, one_step
from nearfield.delta import PendingTokens, delta_rule_commit, delta_rule_verify
from torch import Tensor


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
