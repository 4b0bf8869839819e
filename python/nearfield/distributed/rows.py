"""Rows of a dimension that is split over processes: who has which, and how others get a copy, with gradient."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

Range = tuple[int, int]


def owned_ranges(sizes: Sequence[int]) -> list[Range]:
    """``[begin, end)`` of each process, in the order of their ranks."""
    ends = list(accumulate(sizes))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def gather_sizes(size: int, device: torch.device, group: dist.ProcessGroup | None) -> list[int]:
    """Every process's size. Waits for all of them."""
    mine = torch.tensor([size], device=device)
    sizes = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, mine, group=group)
    return [int(s) for s in sizes]


def gather_rows(
    x: Tensor, dim: int, sizes: Sequence[int], wanted: Sequence[Range], group: dist.ProcessGroup | None
) -> Tensor:
    """The rows ``wanted[rank]`` of the whole tensor, of which x holds this process's; gradients go back to the owners.

    Args:
        x: this process's part, ``sizes[rank]`` rows in dimension dim.
        dim: the dimension that is split.
        sizes: rows of every process.
        wanted: the range of rows that each process asks for, the same list on every process.
        group: the processes; None: all.
    """
    owned = owned_ranges(sizes)
    if 0 < len(_concerned(owned, wanted)) < len(owned):
        # NCCL connects a group in its first call, and waits there for all of its processes.
        dist.all_reduce(x.new_zeros(1), group=group)
    rows: Tensor = _GatherRows.apply(x, dim, owned, list(wanted), group)  # type: ignore[no-untyped-call]
    return rows


def _concerned(owned: Sequence[Range], wanted: Sequence[Range]) -> set[int]:
    """Who has to send or to receive anything."""
    concerned = set()
    for holder, held in enumerate(owned):
        for asker, asked in enumerate(wanted):
            begin, end = _overlap(held, asked)
            if holder != asker and begin < end:
                concerned |= {holder, asker}
    return concerned


def _overlap(a: Range, b: Range) -> Range:
    begin = max(a[0], b[0])
    return begin, max(begin, min(a[1], b[1]))


def _exchange(
    x: Tensor, dim: int, held: list[Range], asked: list[Range], group: dist.ProcessGroup | None
) -> list[tuple[Range, Tensor]]:
    """Sends every process what x holds of its range; returns what the others (and x) hold of ours, by rank."""
    me, world = dist.get_rank(group), dist.get_world_size(group)
    received: list[tuple[Range, Tensor]] = []
    operations = []
    for rank in range(world):
        peer = rank if group is None else dist.get_global_rank(group, rank)
        begin, end = _overlap(held[me], asked[rank])
        part = x.narrow(dim, begin - held[me][0], end - begin) if end > begin else None
        if part is not None and rank != me:
            operations.append(dist.P2POp(dist.isend, part.contiguous(), peer, group))
        begin, end = _overlap(held[rank], asked[me])
        if end > begin and rank == me:
            assert part is not None
            received.append(((begin, end), part))
        elif end > begin:
            shape = list(x.shape)
            shape[dim] = end - begin
            received.append(((begin, end), x.new_empty(shape)))
            operations.append(dist.P2POp(dist.irecv, received[-1][1], peer, group))
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    return received


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dim: int,
        owned: list[Range],
        wanted: list[Range],
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        ctx.arguments = dim, owned, wanted, group
        parts = _exchange(x, dim, owned, wanted, group)  # the ranks' ranges follow each other
        return torch.cat([part for _, part in parts], dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dim, owned, wanted, group = ctx.arguments
        begin, end = owned[dist.get_rank(group)]
        shape = list(grad.shape)
        shape[dim] = end - begin
        total = grad.new_zeros(shape)
        # In the order of the ranks, so that the sum repeats to the bit.
        for (first, last), part in _exchange(grad, dim, wanted, owned, group):
            total.narrow(dim, first - begin, last - first).add_(part)
        return total, None, None, None, None
