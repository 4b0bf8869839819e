"""How close is close enough: the error of plain PyTorch in the same dtype is the yardstick.

The one rule of the tests, of ``doctor`` and of the benchmarks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Of the delta rule: a chunk sums up to 64 rounded products where the recurrence, the yardstick, rounds one state.
DELTA_FACTOR = 3.0


@dataclass(frozen=True)
class Accuracy:
    """Distance from a float64 truth, as a share of its largest value."""

    error: float  # infinite if a value is not finite where the truth is, or the other way round
    allowed: float
    norm: str = "largest"  # or "rms"

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed


def measure(
    got: Tensor, truth: Tensor, eager: Tensor | Sequence[Tensor], factor: float = 2.0, *, scale: float = 0.0
) -> Accuracy:
    """``got`` may be ``factor`` times as far from the float64 ``truth`` as ``eager``, plain PyTorch in got's dtype.

    One rounding of the largest value is always allowed (1e-10 of it in float64), because an eager result can be
    exact by luck. Several eager results, the same sums in other orders, count by the worst. ``scale`` raises that
    largest value where the truth is a difference that cancels (a zero gradient).

    Both the largest error and the root mean square error are held to the bound; the second is returned where only
    it is too large.
    """
    if got.shape != truth.shape:
        raise ValueError(f"the result has shape {list(got.shape)}, its reference {list(truth.shape)}")
    if truth.numel() == 0:
        return Accuracy(0.0, 0.0)
    unit = 1e-10 if got.dtype == torch.float64 else torch.finfo(got.dtype).eps
    eagers = [eager] if isinstance(eager, Tensor) else eager
    got, truth, *eagers = (t.detach().to("cpu", torch.float64) for t in (got, truth, *eagers))
    finite = truth.isfinite()
    right = bool(got[finite].isfinite().all()) and torch.equal(got[~finite], truth[~finite])
    errors = [torch.where(finite, t - truth, 0.0) for t in (got, *eagers)]
    largest = max(float(torch.where(finite, truth, 0.0).abs().max()), scale)
    found = []
    for norm, order, count in (("largest", torch.inf, 1.0), ("rms", 2, truth.numel() ** 0.5)):
        error, *yardsticks = (float(torch.linalg.vector_norm(e, order)) / count for e in errors)
        allowed = (factor * max(yardsticks) + unit * largest) / (largest or 1.0)
        found.append(Accuracy(error / (largest or 1.0) if right else torch.inf, allowed, norm))
    return next((accuracy for accuracy in found if not accuracy.ok), found[0])


def worst(parts: dict[str, Accuracy]) -> tuple[str, Accuracy]:
    """The part that comes closest to its bound, or exceeds it most."""
    return max(parts.items(), key=lambda item: item[1].error / item[1].allowed if item[1].allowed else 0.0)
