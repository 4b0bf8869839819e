"""Neighborhood attention from its definition: a boolean mask and a softmax. Slow, plain, any dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def visible_keys(
    x: int, length: int, window: int, stride: int, dilation: int, causal: bool, periodic: bool = False
) -> list[int]:
    """Positions that query ``x`` of a dimension sees."""
    return [position for position, _ in neighbors(x, length, window, stride, dilation, causal, periodic)]


def neighbors(
    x: int, length: int, window: int, stride: int, dilation: int, causal: bool, periodic: bool = False
) -> list[tuple[int, int]]:
    """Positions that query ``x`` of a dimension sees, and their offsets from it in steps of the dilation."""
    residue, i = x % dilation, x // dilation
    n = (length - residue + dilation - 1) // dilation  # length of the dilation group
    group = i // stride * stride
    if periodic:
        begin = group + stride // 2 - window // 2
        end = begin + window
    elif causal:
        leader = min(group + stride - 1, n - 1)
        begin, end = max(leader - window + 1, 0), i + 1
    else:
        leader = min(group + stride // 2, n - 1)
        begin = min(max(leader - window // 2, 0), n - window)
        end = begin + window
    return [(residue + dilation * (j % n), j - i) for j in range(begin, end)]


def neighborhood_mask(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    periodic: Sequence[bool] | None = None,
) -> Tensor:
    """Boolean ``[N, N]`` over row-major positions: True where the query (row) sees the key (column)."""
    places = bias_places(size, kernel_size, stride, dilation, is_causal, periodic)
    return places >= 0


def bias_places(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    periodic: Sequence[bool] | None = None,
) -> Tensor:
    """``[N, N]``: where in a flattened bias ``[2 w - 1, ..]`` a query (row) finds a key (column) that it sees; else -1."""
    places = torch.zeros(1, 1, dtype=torch.long)
    periodic = [False] * len(size) if periodic is None else periodic
    for dim in zip(size, kernel_size, stride, dilation, is_causal, periodic, strict=True):
        length, window = dim[:2]
        one = torch.full((length, length), -1)
        for x in range(length):
            for position, offset in neighbors(x, *dim):
                one[x, position] = offset + window - 1
        outer, inner = places[:, None, :, None], one[None, :, None, :]
        both = torch.where((outer < 0) | (inner < 0), -1, outer * (2 * window - 1) + inner)
        places = both.reshape(places.shape[0] * length, -1)
    return places


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
    bias: Tensor | None = None,
    periodic: Sequence[bool] | None = None,
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of ``q [B, *X, H, D]``, ``k [B, *X, Hkv, D]``, ``v [B, *X, Hkv, Dv]``.

    The window parameters hold one entry per dimension, or, all four of them, one such tuple per head. ``bias
    [H, 2 w - 1, ..]`` is added by relative position to the scaled scores of the grid. ``periodic`` holds one entry per
    dimension.
    """
    q_shape, size, heads = q.shape[:-1], q.shape[1:-2], q.shape[-2]
    windows = (kernel_size, stride, dilation, is_causal)
    rows: Any = zip(*windows, strict=True) if isinstance(kernel_size[0], Sequence) else [windows]
    rows = [(*row, periodic) for row in rows]
    places = torch.stack([bias_places(size, *row) for row in rows]).to(q.device)  # [H or 1, N, N]
    mask = places >= 0
    q, k, v = (t.flatten(1, -3) for t in (q, k, v))
    if additional_keys is not None and additional_values is not None:
        k, v = torch.cat([k, additional_keys], 1), torch.cat([v, additional_values], 1)
        mask = torch.cat([mask, mask.new_ones(*mask.shape[:2], additional_keys.shape[1])], 2)
    k, v = (t.repeat_interleave(heads // t.shape[2], 2) for t in (k, v))
    z = scale * torch.einsum("bxhd,byhd->bhxy", q, k)
    if bias is not None:
        flat = places.clamp(min=0).expand(heads, -1, -1).flatten(1)
        of_pair = bias.flatten(1).gather(1, flat).reshape(heads, *places.shape[1:])
        z = z + F.pad(of_pair, (0, mask.shape[2] - places.shape[2]))
    z = z.masked_fill(~mask, float("-inf"))
    out = torch.einsum("bhxy,byhe->bxhe", z.softmax(-1), v)
    lse = z.logsumexp(-1).transpose(1, 2)
    return out.reshape(*q_shape, v.shape[-1]), lse.reshape(q_shape)
