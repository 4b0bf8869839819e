"""Rotary position embedding on grids of any rank."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(x: Tensor, *, offset: int = 0, base: float = 10000.0) -> Tensor:
    """Turns pairs of channels by angles that grow with the position, so that ``q.k`` depends on distances only.

    The channel pairs are shared out evenly among the axes of the grid; the last axes get what is left over.
    Pair i of an axis with P pairs turns by ``position * base^(-i/P)``. (RoFormer, arXiv 2104.09864.)

    Args:
        x: ``[B, *X, H, D]`` with an even D of at least two channels per axis.
        offset: position of the first element along every axis.
        base: the slowest pair turns by about 1/base per position.

    Returns:
        A tensor like x.
    """
    size, dim = x.shape[1:-2], x.shape[-1]
    rank = len(size)
    if rank < 1 or dim % 2 or dim < 2 * rank:
        raise ValueError(
            f"rotary: x has shape {list(x.shape)}, expected [B, *X, H, D] with an even D of at least two per axis"
        )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    pairs_left, angles = dim // 2, []
    for axis, length in enumerate(size):
        pairs = pairs_left // (rank - axis)
        pairs_left -= pairs
        frequency = base ** -(torch.arange(pairs, device=x.device, dtype=dtype) / pairs)
        position = torch.arange(offset, offset + length, device=x.device, dtype=dtype)
        along = [length if a == axis else 1 for a in range(rank)]
        angles.append((position[:, None] * frequency).reshape(*along, pairs).expand(*size, pairs))
    angle = torch.cat(angles, -1).unsqueeze(-2)  # [*X, 1, D / 2]
    cos, sin = angle.cos(), angle.sin()
    a, b = x.to(dtype).chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)
