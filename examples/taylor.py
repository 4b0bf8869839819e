"""Linear attention with the second-order Taylor feature map of BASED: the delta family without correction."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TaylorLinearAttention(nn.Module):
    """Causal attention with the weights ``1 + u + u^2 / 2``, where ``u = q.k / sqrt(d)`` (BASED, arXiv 2402.18668).

    These are the inner products of feature maps ``[1, x d^-1/4, vec(x x^T) / sqrt(2 d)]``, so the memory has the fixed
    size of ``1 + d + d^2`` rows. For sequences as short as those of the examples the polynomial is evaluated on all
    pairs, which gives the same numbers.
    """

    def __init__(self, dim: int, num_heads: int, feature_dim: int = 16) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, num_heads * feature_dim, bias=False)
        self.k = nn.Linear(dim, num_heads * feature_dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.num_heads, -1)) for layer in (self.q, self.k, self.v))
        u = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
        weights = (1 + u + u.square() / 2).tril()
        o = torch.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdim=True), v)
        y: Tensor = self.proj(o.flatten(-2))
        return y
