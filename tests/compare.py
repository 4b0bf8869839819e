"""``nearfield._accuracy`` as an assertion that says where two tensors differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from nearfield._accuracy import measure
from torch import Tensor


def worst(got: Tensor, truth: Tensor) -> str:
    """Where two tensors differ most, for the failure message."""
    got, truth = got.detach().to("cpu", torch.float64), truth.detach().to("cpu", torch.float64)
    error = torch.where(got == truth, 0.0, got - truth).abs().nan_to_num(nan=torch.inf)
    flat = int(error.flatten().argmax())
    where = [int(i) for i in torch.unravel_index(torch.tensor(flat), error.shape)]
    return f"worst at {where}: got {got.flatten()[flat].item():.8g}, truth {truth.flatten()[flat].item():.8g}"


def assert_accurate(
    what: str,
    got: Tensor,
    truth: Tensor,
    eager: Tensor | Sequence[Tensor],
    *,
    factor: float = 2.0,
    scale: float = 0.0,
) -> None:
    """``got`` is close enough to ``truth`` by the rule of :func:`nearfield._accuracy.measure`."""
    assert got.shape == truth.shape, f"{what}: shape {list(got.shape)}, expected {list(truth.shape)}"
    found = measure(got, truth, eager, factor, scale=scale)
    assert found.ok, (
        f"{what}: {found.norm} error {found.error:.3g} > allowed {found.allowed:.3g} of the largest value; "
        + worst(got, truth)
    )
