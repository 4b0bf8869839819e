"""States of the delta rule: initial, final, on the way, and what a span of tokens does to one."""

from __future__ import annotations

import pytest
import torch
from delta_cases import GATE_KINDS, check, make, name_of, run
from nearfield.delta import delta_rule, delta_rule_states, delta_rule_states_reference, delta_rule_transition


def test_no_tokens_keep_the_state() -> None:
    args = make(T=0)
    o, state = delta_rule(**args, output_final_state=True)
    assert o.shape == (2, 0, 2, 16)
    assert torch.equal(state, args["initial_state"])


@pytest.mark.parametrize("gate", GATE_KINDS)
def test_state_v_first(gate: str) -> None:
    args = make(gate=gate, state_v_first=True)
    check(args | {"state_v_first": True})
    o, state = delta_rule(**args, state_v_first=True, output_final_state=True)
    args["initial_state"] = args["initial_state"].transpose(-1, -2)
    o2, state2 = delta_rule(**args, output_final_state=True)
    assert torch.equal(o, o2)
    assert torch.equal(state, state2.transpose(-1, -2))


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


def test_no_state_output() -> None:
    args = make()
    o, state = delta_rule(**args)
    assert state is None
    q = args["q"].requires_grad_()
    (grad,) = torch.autograd.grad(delta_rule(**args)[0].sum(), q)
    assert grad.isfinite().all()
    assert torch.equal(o, delta_rule(**args, output_final_state=True)[0])


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
