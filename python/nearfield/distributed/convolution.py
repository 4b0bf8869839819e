"""The short convolution before the delta rule, of sequences that are split over processes along time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from nearfield import _runtime
from nearfield.distributed.replicated import replicated
from nearfield.distributed.rows import gather_rows, gather_sizes, owned_ranges

_OP = "distributed.short_convolution"


def short_convolution(
    x: Tensor,
    weight: Tensor,
    *,
    sizes: Sequence[int] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """:class:`nearfield.nn.ShortConvolution` on sequences of which every process holds a span, in the order of the ranks.

    The ``size - 1`` tokens before a span come from the processes that hold them; their gradients travel back.

    Args:
        x: this process's span ``[B, T, C]``; the spans may have different lengths.
        weight: ``[C, 1, size]``, the same on every process; so is its gradient, the sum over all.
        sizes: length of every process's span; None: ask the others, which costs a small collective and waits for it.
        group: the processes; None: all.

    Returns:
        ``[B, T, C]``, after SiLU.
    """
    _runtime.check_tensors(_OP, x=x, weight=weight)
    if x.dim() != 3:
        _runtime.shape_error(_OP, "x", x, "[B, T, C]")
    if weight.dim() != 3 or weight.shape[:2] != (x.shape[2], 1):
        _runtime.shape_error(_OP, "weight", weight, f"[{x.shape[2]}, 1, size], for every channel of x")
    if sizes is None:
        sizes = gather_sizes(x.shape[1], x.device, group)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if len(sizes) != world or sizes[rank] != x.shape[1] or min(sizes) < 1:
        raise ValueError(
            f"{_OP}: sizes is {list(sizes)}, expected {world} of at least 1, of which number {rank} is {x.shape[1]}"
        )
    past, owned = weight.shape[2] - 1, owned_ranges(sizes)
    reach = [(max(0, begin - past), end) for begin, end in owned]
    rows = gather_rows(x, 1, sizes, reach, group)
    zeros = x.new_zeros(x.shape[0], past + x.shape[1] - rows.shape[1], x.shape[2])  # before the sequences
    inputs = torch.cat([zeros, rows], 1)
    return F.silu(F.conv1d(inputs.mT, replicated(weight, group), groups=x.shape[2]).mT)
