"""A learned ridge per head, the bandwidth of local linear attention's fit."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LearnedRidge(nn.Module):
    """What the layers of local linear attention share: ``lam = softplus(theta) + lam_min`` per query head."""

    theta: nn.Parameter
    lam_min: float

    def begin_ridge(self, num_heads: int, lam: float, lam_min: float) -> None:
        """Makes the parameter so that the ridge is ``lam``."""
        if not 0 < lam_min < lam < math.inf:
            raise ValueError(
                f"{type(self).__name__}: got lam {lam} and lam_min {lam_min}, expected 0 < lam_min < lam"
            )
        self.lam_min = lam_min
        # softplus(theta) = excess, solved for theta without overflow.
        excess = lam - lam_min
        self.theta = nn.Parameter(torch.full((num_heads,), excess + math.log(-math.expm1(-excess))))

    @property
    def lam(self) -> Tensor:
        """The ridge per query head, ``[H]``."""
        return F.softplus(self.theta) + self.lam_min
