"""Local linear attention as it is written without a kernel for it: causal, a block of queries at a time, the solver's
products as matrix products in the inputs' type, all of it through ``torch.compile``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

BLOCK = 512  # queries


def call(q: Tensor, k: Tensor, v: Tensor, lam: Tensor, steps: int) -> Tensor:
    """[B, T, H, D] to [B, T, H, D]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    length, out = q.shape[2], []
    for first in range(0, length, BLOCK):
        end = min(first + BLOCK, length)
        rows = torch.arange(first, end, device=q.device)
        out.append(_compiled(steps)(q[:, :, first:end], k[:, :, :end], v[:, :, :end], lam, rows))
    return torch.cat(out, 2).transpose(1, 2)


@functools.cache
def _compiled(steps: int) -> Any:
    return torch.compile(functools.partial(of_rows, steps=steps), dynamic=True)  # one graph for all lengths


def of_rows(q: Tensor, k: Tensor, v: Tensor, lam: Tensor, rows: Tensor, *, steps: int) -> Tensor:
    """The rows of some queries; `steps` of conjugate gradients from zero."""
    scores = (q @ k.mT).float() * q.shape[-1] ** -0.5
    seen = torch.arange(k.shape[2], device=q.device) <= rows[:, None]
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1).to(q.dtype)
    kbar = (p @ k).float()

    def slopes(x: Tensor) -> Tensor:
        """(k_j - kbar) x"""
        found: Tensor = (x.to(k.dtype) @ k.mT).float() - (kbar * x).sum(-1, keepdim=True)
        return found

    def system(x: Tensor) -> Tensor:
        weights = p.float() * slopes(x)
        image: Tensor = (weights.to(k.dtype) @ k).float() - weights.sum(-1, keepdim=True) * kbar + lam * x
        return image

    residual = q.float() - kbar
    x, direction = torch.zeros_like(residual), residual
    squares = residual.square().sum(-1, keepdim=True)
    for _ in range(steps):
        image = system(direction)
        step = squares / (direction * image).sum(-1, keepdim=True).clamp_min(1e-30)
        x, residual = x + step * direction, residual - step * image
        before, squares = squares, residual.square().sum(-1, keepdim=True)
        direction = residual + squares / before.clamp_min(1e-30) * direction
    out: Tensor = (p.float() * (1 + slopes(x))).to(v.dtype) @ v
    return out
