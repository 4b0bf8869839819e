"""How close is close enough: the error of plain PyTorch in the same dtype is the yardstick."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Accuracy:
    """Largest distances from a float64 truth, as shares of its largest value."""

    error: float  # infinite if a value is not finite where the truth is
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed


def measure(
    got: Tensor, truth: Tensor, eager: Tensor, factor: float = 2.0, *, scale: float = 0.0
) -> Accuracy:
    """``got`` may be ``factor`` times as far from ``truth`` as ``eager``, and one rounding of the largest value.

    ``scale`` raises that largest value where the truth is a difference that cancels.
    """
    if got.shape != truth.shape:
        raise ValueError(f"the result has shape {list(got.shape)}, its reference {list(truth.shape)}")
    unit = 1e-10 if got.dtype == torch.float64 else torch.finfo(got.dtype).eps
    got, truth, eager = (t.detach().to("cpu", torch.float64) for t in (got, truth, eager))
    if truth.numel() == 0:
        return Accuracy(0.0, 0.0)
    largest = max(float(truth.abs().max()), scale) or 1.0
    error = (got - truth).abs().nan_to_num(nan=torch.inf, posinf=torch.inf).max()
    return Accuracy(float(error) / largest, factor * float((eager - truth).abs().max()) / largest + unit)


def worst(parts: dict[str, Accuracy]) -> tuple[str, Accuracy]:
    """The part that comes closest to its bound, or exceeds it most."""
    return max(parts.items(), key=lambda item: item[1].error / item[1].allowed if item[1].allowed else 0.0)
