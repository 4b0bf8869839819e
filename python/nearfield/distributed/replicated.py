"""Tensors of which every process holds the same copy."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def replicated(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """x itself; its gradient is the sum over the processes, each of which sees only its own part of the positions."""
    same: Tensor = _Replicated.apply(x, group)  # type: ignore[no-untyped-call]
    return same


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None
