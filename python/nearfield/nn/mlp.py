"""The feed-forward half of a transformer block."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class SwiGLU(nn.Module):
    """``W3 (silu(W1 x) * W2 x)`` (arXiv 2002.05202); W1 and W2 are one product."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, -1)
        y: Tensor = self.down(F.silu(gate) * value)
        return y
