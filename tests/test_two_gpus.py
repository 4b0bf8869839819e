"""A process with several GPUs: every operator on one that is not the current one gives the bits of the current one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from nearfield import (
    delta_rule,
    delta_rule_step,
    local_linear_attention,
    local_linear_attention_step,
    neighborhood_attention,
    neighborhood_local_linear_attention,
    probe_attention,
)
from nearfield.delta import delta_rule_commit, delta_rule_transition, delta_rule_verify
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

DTYPES = {"hopper": torch.bfloat16, "portable": torch.float32}
Function = Callable[[list[Tensor]], tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """The gradient of neighborhood attention repeats its bits only then."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def tokens(dtype: torch.dtype, *shape: int) -> list[Tensor]:
    """q, k, v with their features last, rounded to dtype, and beta, g without features."""
    q, k, v = (torch.randn(*shape, 64) for _ in range(3))
    beta, g = torch.rand(*shape), -0.1 * torch.rand(*shape)
    return [q.to(dtype), torch.nn.functional.normalize(k, dim=-1).to(dtype), v.to(dtype), beta, g]


FUNCTIONS: dict[str, tuple[tuple[int, ...], Function]] = {
    "gna": ((2, 12, 20, 3), lambda t: (neighborhood_attention(*t[:3], (5, 7)),)),
    "delta": ((2, 150, 3), lambda t: (delta_rule(*t)[0],)),
    "transition": ((2, 150, 3), lambda t: delta_rule_transition(*t[1:])),
    "lla": ((2, 150, 3), lambda t: (local_linear_attention(*t[:3], lam=1.0, is_causal=True),)),
    "lla-grid": ((1, 12, 20, 3), lambda t: (neighborhood_local_linear_attention(*t[:3], (5, 7), lam=1.0),)),
    "readout": ((2, 150, 3), lambda t: (probe_attention(t[0], 0.1 * t[1], *t[1:3]),)),
}


def outputs_and_gradients(function: Function, inputs: list[Tensor], device: str) -> list[Tensor]:
    leaves = [t.to(device).requires_grad_() for t in inputs]
    outputs = function(leaves)
    loss = torch.stack([o.float().sin().sum() for o in outputs]).sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    results = [*outputs, *(g for g in grads if g is not None)]
    assert all(t.device == torch.device(device) for t in results)
    return [t.detach().cpu() for t in results]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_and_backward(name: str, dtype: str) -> None:
    shape, function = FUNCTIONS[name]
    inputs = tokens(DTYPES[dtype], *shape)
    assert torch.cuda.current_device() == 0
    # The other one first: what the current one asks of the driver must not be what makes it work there.
    other = outputs_and_gradients(function, inputs, "cuda:1")
    for got, expected in zip(other, outputs_and_gradients(function, inputs, "cuda:0"), strict=True):
        assert expected.isfinite().all()
        assert torch.equal(got, expected)


def delta_decoding(inputs: list[Tensor], device: str) -> list[Tensor]:
    q, k, v, beta, g = (t.to(device) for t in inputs)
    state = torch.zeros(2, 3, 64, 64, device=device)
    o = delta_rule_step(q, k, v, beta, g, state=state)
    guess, pending = delta_rule_verify(q, k, v, beta, g, state=state)
    accepted = torch.tensor([1, 2], dtype=torch.int32, device=device)
    delta_rule_commit(pending, accepted, state=state)
    return [o, guess, state]


def lla_decoding(inputs: list[Tensor], device: str) -> list[Tensor]:
    q, k, v = (t.to(device) for t in inputs[:3])
    return [local_linear_attention_step(q[:, :1], k, v, lam=1.0)]


@pytest.mark.parametrize(
    ("decoding", "length"), [(delta_decoding, 3), (lla_decoding, 300), (lla_decoding, 3000)]
)
def test_decoding(decoding: Callable[[list[Tensor], str], list[Tensor]], length: int) -> None:
    inputs = tokens(torch.bfloat16, 2, length, 3)
    other = decoding(inputs, "cuda:1")
    assert all(t.device == torch.device("cuda:1") for t in other)
    for got, expected in zip(other, decoding(inputs, "cuda:0"), strict=True):
        assert expected.isfinite().all()
        assert torch.equal(got.cpu(), expected.cpu())


def test_inputs_on_different_gpus_are_refused() -> None:
    q, k, v, *_ = tokens(torch.bfloat16, 1, 64, 2)
    with pytest.raises((ValueError, RuntimeError), match="k is on"):
        neighborhood_attention(q.to("cuda:0"), k.to("cuda:1"), v.to("cuda:0"), 7)
