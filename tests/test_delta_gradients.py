"""Which gradients of the delta rule are computed, from what, and what is kept for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from delta_cases import GATE_KINDS, LEAVES, check, make, operator_arguments, run
from nearfield.delta import delta_rule, op
from torch import Tensor


@pytest.mark.parametrize("gate", GATE_KINDS)
@pytest.mark.parametrize("only", ["o", "state"])
def test_one_gradient(only: str, gate: str) -> None:
    got = check(make(gate=gate), only=only)
    if only == "state":
        assert (got["q"] == 0).all()


@pytest.mark.parametrize("wanted", LEAVES[:6])
def test_gradient_of_one_input(wanted: str) -> None:
    args = make(gate="channel")
    everything = run(delta_rule, args, torch.ones(2, 100, 2, 16), torch.ones(2, 2, 24, 16), None)
    args[wanted].requires_grad_()
    o, state = delta_rule(**args, output_final_state=True)
    (o.sum() + state.sum()).backward()
    assert torch.equal(args[wanted].grad, everything[wanted])
    assert all(t.grad is None for name, t in args.items() if name != wanted)


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
        assert op.kept_bytes(q, v, None, None, None) == 64 * chunks * (156 + 6 * 192)
        assert op.kept_bytes(q, v, g, None, "hopper") == 64 * chunks * (156 + 6 * 192 + 1288)
        assert op.kept_bytes(q[:1], v[:1], g, torch.tensor([0, 3, 9]), None) == 64 * 4 * 4 * (
            156 + 1152 + 1288
        )
        assert op.kept_bytes(q, v, None, None, "portable") == 0
        assert op.kept_bytes(q[..., :60], v, None, None, None) == 0
        assert op.kept_bytes(q[:, :0], v[:, :0], None, None, None) == 0
