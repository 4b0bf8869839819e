"""RMS norm whose output a gate may close."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class GatedRMSNorm(nn.RMSNorm):
    """``norm(x) * weight * silu(gate)`` over the last dimension; without a gate, plain RMS norm."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        y: Tensor = super().forward(x)
        return y if gate is None else y * F.silu(gate)
