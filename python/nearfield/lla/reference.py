"""The definition of local linear attention, written out: all matrices formed, all systems solved directly.

Memory is O(m n d + m d^2) per head; use it for tests and for small problems. Any floating dtype that
torch.linalg supports, any device, differentiable.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from nearfield.gna.reference import neighborhood_mask


def visible_keys(
    m: int,
    n: int,
    *,
    is_causal: bool,
    window: int | None,
    device: torch.device | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Mask [m, n]: True where query i sees key j. Query i stands at key position i + n - m.

    Packed sequences (m = n) see only themselves, and tokens behind the last see nothing.
    """
    if cu_seqlens is not None:
        mask = torch.zeros(m, n, dtype=torch.bool, device=device)
        bounds = cu_seqlens.tolist()
        for begin, end in itertools.pairwise(bounds):
            length = end - begin
            mask[begin:end, begin:end] = visible_keys(
                length, length, is_causal=is_causal, window=window, device=device
            )
        return mask
    position = torch.arange(n - m, n, device=device)[:, None]
    key = torch.arange(n, device=device)[None]
    width = n if window is None else min(window, n)
    if is_causal:
        return (key <= position) & (key > position - width)
    start = (position - width // 2).clamp(0, n - width)
    return (key >= start) & (key < start + width)


def ridge_per_row(lam: float | Tensor, q: Tensor) -> Tensor:
    """The ridge as [B, m, Hq, 1] or, per channel, [B, m, Hq, d]; unchanged if it already is."""
    batch, m, heads, d = q.shape
    lam = torch.as_tensor(lam, dtype=q.dtype, device=q.device)
    if lam.ndim == 4:
        return lam
    shape = {0: (1, 1, 1, 1), 1: (1, 1, heads, 1), 2: (1, 1, heads, d), 3: (batch, m, heads, 1)}[lam.ndim]
    return lam.reshape(shape).expand(batch, m, heads, shape[-1])


def _softmax(q: Tensor, k: Tensor, scale: float | None, mask: Tensor) -> tuple[Tensor, Tensor]:
    """p [B, m, Hq, n] and lse [B, m, Hq]; a query without keys has p = 0, lse = -inf. k has all Hq heads."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = scale * torch.einsum("bihd,bjhd->bihj", q, k)
    s = s.masked_fill(~mask[None, :, None], -torch.inf)
    lse = torch.logsumexp(s, -1)
    empty = ~mask.any(-1)[None, :, None, None]
    return torch.softmax(s.masked_fill(empty, 0), -1).masked_fill(empty, 0), lse


def _readout(p: Tensor, kbar: Tensor, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """o_i = sum_j p_ij (1 + (k_j - kbar_i).x_i) v_j"""
    slope = torch.einsum("bjhd,bihd->bihj", k, x) - torch.einsum("bihd,bihd->bih", kbar, x)[..., None]
    return torch.einsum("bihj,bjhe->bihe", p * (1 + slope), v)


def _repeat_heads(t: Tensor, heads: int) -> Tensor:
    return t.repeat_interleave(heads // t.shape[2], dim=2) if heads else t


def probe_attention(
    q: Tensor,
    x: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = True,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """o_i = sum_j p_ij (1 + (k_j - kbar_i).x_i) v_j for given x."""
    mask = visible_keys(
        q.shape[1], k.shape[1], is_causal=is_causal, window=window, device=q.device, cu_seqlens=cu_seqlens
    )
    return _probe(q, x, k, v, scale, mask)


def neighborhood_probe_attention(
    q: Tensor, x: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, **windows: Any
) -> Tensor:
    """The same on a grid: tensors [B, *X, H, ..], windows as in ``neighborhood_mask``."""
    mask = neighborhood_mask(q.shape[1:-2], **windows).to(q.device)
    o = _probe(q.flatten(1, -3), x.flatten(1, -3), k.flatten(1, -3), v.flatten(1, -3), scale, mask)
    return o.reshape(*q.shape[:-1], -1)


def _probe(q: Tensor, x: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor) -> Tensor:
    k, v = _repeat_heads(k, q.shape[2]), _repeat_heads(v, q.shape[2])
    p, _ = _softmax(q, k, scale, mask)
    kbar = torch.einsum("bihj,bjhd->bihd", p, k)
    return _readout(p, kbar, x, k, v)


def local_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lam: float | Tensor,
    scale: float | None = None,
    is_causal: bool = True,
    window: int | None = None,
    ridge: str = "relative",
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The centred definition with a direct solve. Returns o [B, m, Hq, dv] and the probe x [B, m, Hq, d]."""
    mask = visible_keys(
        q.shape[1], k.shape[1], is_causal=is_causal, window=window, device=q.device, cu_seqlens=cu_seqlens
    )
    return _fit(q, k, v, lam, scale, ridge, mask)[:2]


def neighborhood_local_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lam: float | Tensor,
    scale: float | None = None,
    ridge: str = "relative",
    **windows: Any,
) -> tuple[Tensor, Tensor]:
    """The same on a grid: tensors [B, *X, H, ..], windows as in ``neighborhood_mask``. Returns o and lse [B, *X, H]."""
    mask = neighborhood_mask(q.shape[1:-2], **windows).to(q.device)
    if isinstance(lam, Tensor) and lam.shape == q.shape[:-1]:
        lam = lam.flatten(1, q.ndim - 3)
    o, _, lse = _fit(q.flatten(1, -3), k.flatten(1, -3), v.flatten(1, -3), lam, scale, ridge, mask)
    return o.reshape(*q.shape[:-1], -1), lse.reshape(q.shape[:-1])


def _fit(
    q: Tensor, k: Tensor, v: Tensor, lam: float | Tensor, scale: float | None, ridge: str, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    k, v = _repeat_heads(k, q.shape[2]), _repeat_heads(v, q.shape[2])
    p, lse = _softmax(q, k, scale, mask)
    empty = ~mask.any(-1)[None, :, None, None]
    rows = ridge_per_row(lam, q)
    if ridge == "absolute":
        rows = rows * torch.exp(-lse)[..., None].masked_fill(empty, 1)
    kbar = torch.einsum("bihj,bjhd->bihd", p, k)
    centred = k[:, None] - kbar[:, :, None]  # [B, m, n, Hq, d]
    covariance = torch.einsum("bihj,bijhd,bijhe->bihde", p, centred, centred)
    system = covariance + torch.diag_embed(rows.expand_as(q))
    g = (q - kbar).masked_fill(empty, 0)
    x = torch.linalg.solve(system, g[..., None])[..., 0]
    return _readout(p, kbar, x, k, v), x, lse


def penalised_least_squares(
    q: Tensor, k: Tensor, v: Tensor, *, lam: float, scale: float, mask: Tensor
) -> Tensor:
    """What local linear attention solves, for one head: q [m, d], k [n, d], v [n, dv], mask [m, n].

    Per query: minimise 1/2 sum_j p_j |v_j - b - W (k_j - q)|^2 + lam/2 |W|_F^2 and return b. Shares nothing
    with the formulas above.
    """
    rows = []
    for i in range(q.shape[0]):
        seen = mask[i].nonzero()[:, 0]
        p = torch.softmax(scale * (k[seen] @ q[i]), 0)
        design = torch.cat([torch.ones(len(seen), 1, dtype=q.dtype), k[seen] - q[i]], 1)
        penalty = lam * torch.eye(design.shape[1], dtype=q.dtype)
        penalty[0, 0] = 0
        normal = design.T @ (p[:, None] * design) + penalty
        rows.append(torch.linalg.solve(normal, design.T @ (p[:, None] * v[seen]))[0])
    return torch.stack(rows)
