"""Neighborhood attention from its definition: a boolean mask and a softmax. Slow, plain, any dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def visible_keys(x: int, length: int, window: int, stride: int, dilation: int, causal: bool) -> list[int]:
    """Positions that query ``x`` of a dimension sees."""
    residue, i = x % dilation, x // dilation
    n = (length - residue + dilation - 1) // dilation  # length of the dilation group
    group = i // stride * stride
    if causal:
        leader = min(group + stride - 1, n - 1)
        begin, end = max(leader - window + 1, 0), i + 1
    else:
        leader = min(group + stride // 2, n - 1)
        begin = min(max(leader - window // 2, 0), n - window)
        end = begin + window
    return [residue + dilation * j for j in range(begin, end)]


def neighborhood_mask(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
) -> Tensor:
    """Boolean ``[N, N]`` over row-major positions: True where the query (row) sees the key (column)."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    for dim in zip(size, kernel_size, stride, dilation, is_causal, strict=True):
        length = dim[0]
        one = torch.zeros(length, length, dtype=torch.bool)
        for x in range(length):
            one[x, visible_keys(x, *dim)] = True
        both = mask[:, None, :, None] & one[None, :, None, :]
        mask = both.reshape(mask.shape[0] * length, -1)
    return mask


def neighborhood_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: Sequence[int] | Sequence[Sequence[int]],
    stride: Sequence[int] | Sequence[Sequence[int]],
    dilation: Sequence[int] | Sequence[Sequence[int]],
    is_causal: Sequence[bool] | Sequence[Sequence[bool]],
    scale: float,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of ``q [B, *X, H, D]``, ``k [B, *X, Hkv, D]``, ``v [B, *X, Hkv, Dv]``.

    The window parameters hold one entry per dimension, or, all four of them, one such tuple per head.
    """
    q_shape, size, heads = q.shape[:-1], q.shape[1:-2], q.shape[-2]
    windows = (kernel_size, stride, dilation, is_causal)
    rows: Any = zip(*windows, strict=True) if isinstance(kernel_size[0], Sequence) else [windows]
    mask = torch.stack([neighborhood_mask(size, *row) for row in rows]).to(q.device)  # [H or 1, N, N]
    q, k, v = (t.flatten(1, -3) for t in (q, k, v))
    if additional_keys is not None and additional_values is not None:
        k, v = torch.cat([k, additional_keys], 1), torch.cat([v, additional_values], 1)
        mask = torch.cat([mask, mask.new_ones(*mask.shape[:2], additional_keys.shape[1])], 2)
    k, v = (t.repeat_interleave(heads // t.shape[2], 2) for t in (k, v))
    z = scale * torch.einsum("bxhd,byhd->bhxy", q, k)
    z = z.masked_fill(~mask, float("-inf"))
    out = torch.einsum("bhxy,byhe->bxhe", z.softmax(-1), v)
    lse = z.logsumexp(-1).transpose(1, 2)
    return out.reshape(*q_shape, v.shape[-1]), lse.reshape(q_shape)
