"""How close is close enough: the error of plain PyTorch in the same dtype is the yardstick."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def worst(got: Tensor, truth: Tensor) -> str:
    """Where two tensors differ most, for the failure message."""
    error = (got.double() - truth).abs()
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
    """``got`` is at most ``factor`` times as far from the float64 ``truth`` as ``eager``, plain PyTorch in got's dtype.

    One rounding of the largest value is always allowed (1e-10 of it in float64), because an eager result can be
    exact by luck. Several eager results, the same sums in other orders, count by the worst. ``scale`` raises that largest value where the truth is a difference that cancels (a zero gradient).
    Both the largest error and the root mean square error are held to the bound.
    """
    assert got.shape == truth.shape, f"{what}: shape {list(got.shape)}, expected {list(truth.shape)}"
    got, truth = got.detach().cpu(), truth.detach().cpu().double()
    eagers = [t.detach().cpu() for t in ([eager] if isinstance(eager, Tensor) else eager)]
    bad = ~torch.isfinite(got) & torch.isfinite(truth)
    assert not bad.any(), (
        f"{what}: {int(bad.sum())} of {got.numel()} values are NaN or infinite where the truth is finite"
    )
    if got.numel() == 0:
        return
    finite = torch.isfinite(truth)
    assert torch.equal(got[~finite].double(), truth[~finite]), f"{what}: infinities differ from the truth"
    got, truth, *eagers = (torch.where(finite, t, torch.zeros_like(t)) for t in (got, truth, *eagers))
    unit = 1e-10 if got.dtype == torch.float64 else torch.finfo(got.dtype).eps
    floor = unit * max(float(truth.abs().max()), scale)
    for name, norm in (("largest", torch.inf), ("rms", 2)):
        count = got.numel() ** 0.5 if norm == 2 else 1.0
        error = float(torch.linalg.vector_norm(got.double() - truth, norm)) / count
        yardstick = max(float(torch.linalg.vector_norm(t.double() - truth, norm)) for t in eagers)
        allowed = factor * yardstick / count + floor
        assert error <= allowed, (
            f"{what}: {name} error {error:.3g} > allowed {allowed:.3g}; {worst(got, truth)}"
        )
