"""torch.func and forward mode: gradients under transforms, and a refusal where torch would drop a tangent silently."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from nearfield import (
    delta_rule,
    delta_rule_step,
    local_linear_attention,
    local_linear_attention_step,
    neighborhood_attention,
    probe_attention,
)
from nearfield.delta import delta_rule_transition
from torch import Tensor
from torch.autograd import forward_ad

Function = Callable[[Tensor], Tensor]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(2, 12, 2, 8, dtype=torch.float64) for _ in range(3))
    return q, torch.nn.functional.normalize(k, dim=-1), v


def functions() -> dict[str, Function]:
    """Of q alone, each down to a number."""
    _, k, v = inputs()
    beta = torch.rand(2, 12, 2, dtype=torch.float64)
    return {
        "neighborhood_attention": lambda q: neighborhood_attention(q, k, v, 5).sin().sum(),
        "delta_rule": lambda q: delta_rule(q, k, v, beta)[0].sin().sum(),
        "local_linear_attention": lambda q: local_linear_attention(q, k, v, lam=1.0).sin().sum(),
        "probe_attention": lambda q: probe_attention(q, 0.1 * k, k, v).sin().sum(),
    }


@pytest.mark.parametrize("name", functions())
def test_gradients_of_torch_func_are_those_of_backward(name: str) -> None:
    function, (q, _, _) = functions()[name], inputs()
    leaf = q.clone().requires_grad_()
    function(leaf).backward()
    assert leaf.grad is not None
    torch.testing.assert_close(torch.func.grad(function)(q), leaf.grad, rtol=0, atol=0)


def test_gradient_of_a_transition() -> None:
    _, k, v = inputs()
    beta = torch.rand(2, 12, 2, dtype=torch.float64)

    def function(k: Tensor) -> Tensor:
        return sum((part.sin().sum() for part in delta_rule_transition(k, v, beta)), k.new_zeros(()))

    leaf = k.clone().requires_grad_()
    function(leaf).backward()
    assert leaf.grad is not None
    torch.testing.assert_close(torch.func.grad(function)(k), leaf.grad, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", functions())
def test_gradients_per_sample(name: str) -> None:
    function, (q, _, _) = functions()[name], inputs()
    samples = torch.stack([q, 2 * q, -q])
    per_sample = torch.func.vmap(torch.func.grad(function))(samples)
    one_by_one = torch.stack([torch.func.grad(function)(sample) for sample in samples])
    torch.testing.assert_close(per_sample, one_by_one)


@pytest.mark.parametrize("name", functions())
def test_second_derivatives_are_refused(name: str) -> None:
    function, (q, _, _) = functions()[name], inputs()
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.func.grad(lambda q: torch.func.grad(function)(q).sum())(q)


@pytest.mark.parametrize("name", functions())
def test_forward_mode_is_refused(name: str) -> None:
    function, (q, _, _) = functions()[name], inputs()
    with pytest.raises(NotImplementedError, match=f"{name}: q has a tangent .* supported: backward mode"):
        torch.func.jvp(function, (q,), (torch.ones_like(q),))
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match=f"{name}: q has a tangent"),
    ):
        function(forward_ad.make_dual(q, torch.ones_like(q)))
    with forward_ad.dual_level():  # no tangent, no refusal
        function(q)


def test_forward_mode_is_refused_by_decode_steps() -> None:
    q, k, v = inputs()
    token = slice(0, 1)
    state = torch.zeros(2, 2, 8, 8, dtype=torch.float64)
    steps: dict[str, Function] = {
        "delta_rule_step": lambda q: delta_rule_step(
            q, k[:, token], v[:, token], torch.ones(2, 1, 2, dtype=torch.float64), state=state
        ),
        "local_linear_attention_step": lambda q: local_linear_attention_step(q, k, v, lam=1.0),
    }
    for name, step in steps.items():
        with pytest.raises(NotImplementedError, match=f"{name}: q has a tangent"):
            torch.func.jvp(step, (q[:, token],), (torch.ones_like(q[:, token]),))
