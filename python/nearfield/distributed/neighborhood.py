"""Neighborhood attention of a grid that is split over processes along one dimension."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from nearfield import _runtime, gna
from nearfield.distributed.replicated import replicated
from nearfield.distributed.rows import Range, gather_rows, gather_sizes, owned_ranges
from nearfield.gna.op import windows_of_head

_OP = "distributed.neighborhood_attention"


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | Sequence[int | None] | None,
    *,
    split_dim: int = 0,
    sizes: Sequence[int] | None = None,
    group: dist.ProcessGroup | None = None,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`nearfield.neighborhood_attention` on a grid of which every process holds a slab.

    Each process fetches the rows of k and v that its windows reach into (the halo) from their owners and computes its
    own queries; in the backward the gradients of the halo travel back. Results and gradients are those of the whole
    grid. The queries are padded to the fetched rows, so a slab should be thicker than its halo.

    Args:
        q, k, v: this process's slab, ``[B, *X, H, D]`` and so on; the slabs follow each other by rank.
        kernel_size, stride, dilation, is_causal, scale, return_lse: as for the whole grid.
        split_dim: which spatial dimension is split, counted from 0 among X.
        sizes: length of every process's slab in that dimension; None: ask the others, which costs a small collective
            and waits for it.
        group: the processes; None: all.
        additional_keys, additional_values: the same on every process; so is their gradient, the sum over all.

    Returns:
        ``out``, or ``(out, lse)``, of this process's queries.
    """
    _runtime.check_tensors(_OP, q=q, k=k, v=v)
    n = q.dim() - 3
    if n not in (1, 2, 3):
        _runtime.shape_error(_OP, "q", q, "[B, *X, H, D] with 1, 2 or 3 spatial dimensions X")
    if not 0 <= split_dim < n:
        raise ValueError(f"{_OP}: split_dim is {split_dim}, expected 0 to {n - 1}, a spatial dimension of q")
    if (
        k.dim() != q.dim()
        or v.dim() != q.dim()
        or k.shape[:-1] != v.shape[:-1]
        or k.shape[:-2] != q.shape[:-2]
    ):
        raise ValueError(
            f"{_OP}: q, k and v have shapes {list(q.shape)}, {list(k.shape)} and {list(v.shape)}, expected the same "
            "batch and spatial sizes, and as many heads in k as in v"
        )
    axis = split_dim + 1
    if sizes is None:
        sizes = gather_sizes(q.shape[axis], q.device, group)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if len(sizes) != world or sizes[rank] != q.shape[axis] or min(sizes) < 1:
        raise ValueError(
            f"{_OP}: sizes is {list(sizes)}, expected {world} of at least 1, of which number {rank} is {q.shape[axis]}"
        )
    whole = list(q.shape[1:-2])
    whole[split_dim] = sum(sizes)
    window, strides, dilations, causal = windows_of_head(
        tuple(whole), kernel_size, stride, dilation, is_causal
    )
    one = (window[split_dim], strides[split_dim], dilations[split_dim], bool(causal[split_dim]))
    owned = owned_ranges(sizes)
    reach = [needed_rows(part, whole[split_dim], *one) for part in owned]
    both = gather_rows(torch.cat([k, v], -1), axis, sizes, reach, group)
    k, v = both[..., : k.shape[-1]], both[..., k.shape[-1] :]
    before, after = owned[rank][0] - reach[rank][0], reach[rank][1] - owned[rank][1]
    shapes = [list(q.shape) for _ in range(2)]
    shapes[0][axis], shapes[1][axis] = before, after
    queries = torch.cat([q.new_zeros(shapes[0]), q, q.new_zeros(shapes[1])], axis)
    if additional_keys is not None and additional_values is not None:
        additional_keys = replicated(additional_keys, group)
        additional_values = replicated(additional_values, group)
    out, lse = gna.neighborhood_attention(
        queries,
        k,
        v,
        window,
        stride=strides,
        dilation=dilations,
        is_causal=[bool(c) for c in causal],
        scale=scale,
        additional_keys=additional_keys,
        additional_values=additional_values,
        return_lse=True,
    )
    out, lse = (t.narrow(axis, before, q.shape[axis]) for t in (out, lse))
    return (out, lse) if return_lse else out


def needed_rows(part: Range, length: int, window: int, stride: int, dilation: int, causal: bool) -> Range:
    """The smallest range of rows on which, taken for a whole grid, the queries of ``part`` see what they must see.

    It holds their keys and the leaders of their stride groups; it starts with a stride group of every dilation
    group; and it is long enough for a window. Longer ranges that start likewise would do too: a border further out
    shifts no window that the true border does not shift.
    """
    begin, end = part
    first, last = begin, end
    # Windows move with the query inside a dilation group, so its first and its last query suffice.
    for x in {*range(begin, min(begin + dilation, end)), *range(max(end - dilation, begin), end)}:
        residue, i = x % dilation, x // dilation
        n = (length - residue + dilation - 1) // dilation
        group = i // stride * stride
        leader = min(group + (stride - 1 if causal else stride // 2), n - 1)
        if causal:
            low, high = max(leader - window + 1, 0), leader
        else:
            low = min(max(leader - window // 2, 0), n - window)
            high = low + window - 1
        first, last = (
            min(first, residue + dilation * low),
            max(last, residue + dilation * max(high, leader) + 1),
        )
    step = stride * dilation
    first = first // step * step
    last = min(max(last, first + window * dilation), length)
    first = min(first, (length - window * dilation) // step * step)
    return first, last
