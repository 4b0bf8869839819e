"""Local linear attention on a grid: every position fits the positions around it.

The operators are those of the one-dimensional case. Tokens go to them in boxes (``csrc/lla/grid.h``), one copy of each
tensor, and come back in their own order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from nearfield import _runtime
from nearfield.gna.op import windows_of_head
from nearfield.lla import op as _op
from nearfield.lla.op import Ridge, SolveInfo


@overload
def neighborhood_local_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, kernel_size: int | Sequence[int | None] | None, *, lam: float | Tensor,
    stride: int | Sequence[int] = ..., dilation: int | Sequence[int] = ..., is_causal: bool | Sequence[bool] = ...,
    scale: float | None = ..., tol: float = ..., max_iters: int = ..., ridge: Ridge = ...,
    return_aux: Literal[False] = ..., backend: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def neighborhood_local_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, kernel_size: int | Sequence[int | None] | None, *, lam: float | Tensor,
    stride: int | Sequence[int] = ..., dilation: int | Sequence[int] = ..., is_causal: bool | Sequence[bool] = ...,
    scale: float | None = ..., tol: float = ..., max_iters: int = ..., ridge: Ridge = ...,
    return_aux: Literal[True], backend: str | None = ...,
) -> tuple[Tensor, SolveInfo]: ...  # fmt: skip
def neighborhood_local_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | Sequence[int | None] | None,
    *,
    lam: float | Tensor,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    tol: float = 1e-3,
    max_iters: int = 16,
    ridge: Ridge = "relative",
    return_aux: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, SolveInfo]:
    """``local_linear_attention`` on a 1-, 2- or 3-dimensional grid: the pairs that a query fits are those around it.

    Args:
        q: queries [B, *X, Hq, d], with X of 1, 2 or 3 spatial dimensions.
        k: keys [B, *X, Hk, d]; Hq is a multiple of Hk (grouped-query attention).
        v: values [B, *X, Hk, dv].
        kernel_size: as in ``neighborhood_attention``, as are stride, dilation and is_causal: the window of a dimension
            is shifted inwards at the border, or in a causal dimension ends at the query and is cut there. All heads
            have one window.
        stride: one value, or one per dimension.
        dilation: one value, or one per dimension.
        is_causal: one bool, or one per dimension.
        lam: as in ``local_linear_attention``; per head and token it is [B, *X, Hq].
        scale, tol, max_iters, ridge, return_aux, backend: as in ``local_linear_attention``.

    Returns:
        o [B, *X, Hq, dv], and with return_aux a ``SolveInfo`` of tensors [B, *X, Hq]. Gradients as in
        ``local_linear_attention``.
    """
    name = "neighborhood_local_linear_attention"
    boxes = boxes_of(name, q, k, v, kernel_size, stride, dilation, is_causal)
    if isinstance(lam, Tensor) and lam.ndim > 2:
        _runtime.check_tensors(name, q=q, lam=lam)
        if lam.shape != q.shape[:-1]:
            h, d = q.shape[-2:]
            expected = f"[], [{h}] per head, [{h}, {d}] per channel or {list(q.shape[:-1])} per token"
            _runtime.shape_error(name, "lam", lam, expected)
        lam = boxes.sort(lam[..., None], fill=1.0)[..., 0]
    q, k, v = boxes.sort(q), boxes.sort(k), boxes.sort(v)
    scale = _op._check(name, q, k, v, scale, None)
    o, info = _op._solve_and_read(
        name, q, k, v, None, lam, scale, False, None, ridge, tol, max_iters, backend, boxes.grid
    )
    o = boxes.restore(o)
    return (o, SolveInfo(*[boxes.restore(t) for t in info])) if return_aux else o


def neighborhood_probe_attention(
    q: Tensor,
    x: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | Sequence[int | None] | None,
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """``probe_attention`` on a grid: local linear attention over neighborhoods with the slope x given.

    x [B, *X, Hq, d] has the shape of q. The other arguments are those of ``neighborhood_local_linear_attention``.
    Differentiable in q, x, k and v.
    """
    name = "neighborhood_probe_attention"
    boxes = boxes_of(name, q, k, v, kernel_size, stride, dilation, is_causal)
    _op._check_probe(name, q, x)
    q, x, k, v = boxes.sort(q), boxes.sort(x), boxes.sort(k), boxes.sort(v)
    scale = _op._check(name, q, k, v, scale, None)
    return boxes.restore(_op._read(name, q, x, k, v, None, scale, False, None, backend, boxes.grid))


@dataclass(frozen=True)
class Boxes:
    """The order in which the operators want the tokens of a grid: by dilation group, box, and place in the box."""

    size: list[int]
    window: list[int]
    stride: list[int]
    dilation: list[int]
    causal: list[int]
    side: list[int]
    """Of a box, in tokens of a dilation group."""

    @property
    def grid(self) -> list[int]:
        """The operators' argument: three entries of each, dimensions that are missing in front."""
        missing = 3 - len(self.size)
        fields = (self.size, self.window, self.stride, self.dilation, self.causal, self.side)
        return [x for i, field in enumerate(fields) for x in ([0 if i == 4 else 1] * missing + field)]

    @property
    def counts(self) -> list[int]:
        """Boxes of a dilation group, per dimension; those beyond a shorter group or the border are empty."""
        return [-(-x // (d * s)) for x, d, s in zip(self.size, self.dilation, self.side, strict=True)]

    def sort(self, t: Tensor, fill: float = 0.0) -> Tensor:
        """[B, *X, H, D] to [B, boxes * 64, H, D]."""
        rank = len(self.size)
        folded = list(zip(self.counts, self.side, self.dilation, strict=True))
        missing = [math.prod(f) - x for f, x in zip(folded, self.size, strict=True)]
        if any(missing):
            t = torch.nn.functional.pad(
                t, [0, 0, 0, 0, *(y for x in reversed(missing) for y in (0, x))], value=fill
            )
        batch, *_, heads, features = t.shape
        t = t.reshape(batch, *[x for f in folded for x in f], heads, features)
        order = [1 + 3 * d + which for which in (2, 0, 1) for d in range(rank)]
        rows = math.prod([math.prod(f) for f in folded])
        return t.permute(0, *order, 3 * rank + 1, 3 * rank + 2).reshape(batch, rows, heads, features)

    def restore(self, t: Tensor) -> Tensor:
        """[B, boxes * 64, ..] to [B, *X, ..]."""
        rank = len(self.size)
        rest = t.shape[2:]
        t = t.reshape(t.shape[0], *self.dilation, *self.counts, *self.side, *rest)
        order = [1 + which * rank + d for d in range(rank) for which in (1, 2, 0)]
        t = t.permute(0, *order, *range(3 * rank + 1, t.ndim))
        padded = [math.prod(f) for f in zip(self.counts, self.side, self.dilation, strict=True)]
        t = t.reshape(t.shape[0], *padded, *rest)
        for d, x in enumerate(self.size):
            t = t.narrow(d + 1, 0, x)
        return t


def boxes_of(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: object,
    stride: object,
    dilation: object,
    is_causal: object,
) -> Boxes:
    """Checks the shapes against the grid and the window's parameters, and picks the boxes that visit the fewest tiles."""
    _runtime.check_tensors(op, q=q, k=k, v=v)
    if q.ndim not in (4, 5, 6) or q.shape[-1] < 1:
        _runtime.shape_error(op, "q", q, "[B, *X, Hq, d] with 1, 2 or 3 spatial dimensions X and d >= 1")
    for name, t in (("k", k), ("v", v)):
        if t.ndim != q.ndim or t.shape[:-2] != q.shape[:-2]:
            expected = f"the batch and spatial sizes of q, {list(q.shape[:-2])}, then heads and features"
            _runtime.shape_error(op, name, t, expected)
    if k.shape[-1] != q.shape[-1]:
        _runtime.shape_error(op, "k", k, f"the head dim of q, {q.shape[-1]}")
    if v.shape[-2] != k.shape[-2]:
        _runtime.shape_error(op, "v", v, f"as many heads as k, {k.shape[-2]}")
    size = tuple(int(x) for x in q.shape[1:-2])
    fields = windows_of_head(size, kernel_size, stride, dilation, is_causal, op)
    return Boxes(list(size), *fields, list(_best_box(size, *(tuple(int(x) for x in f) for f in fields))))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@functools.cache
def _best_box(
    size: tuple[int, ...], window: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...], causal: tuple[int, ...]
) -> tuple[int, ...]:  # fmt: skip
    box: list[int] = torch.ops.nearfield.lla_box(size, window, stride, dilation, causal)
    return tuple(box)
