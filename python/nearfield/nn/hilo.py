"""A sharp window and a blurred whole in one softmax."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from nearfield.nn.neighborhood import NeighborhoodAttention

_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


class HiLoAttention(NeighborhoodAttention):
    """Every position sees its window in full detail and the whole grid as averages of blocks.

    The averages enter as additional tokens with projections of their own, so one kernel call normalises both
    together. HiLo (arXiv 2205.13213), from which the idea is, gives some heads the windows and the others the
    averages; here each head weighs the two.

    Args:
        dim, num_heads: as in :class:`NeighborhoodAttention`.
        kernel_size: window per dimension; their number is the rank of the grid.
        pool_size: block that is averaged, one value or one per dimension; partial blocks at the end are averaged
            over what they have.
        stride, dilation, num_kv_heads, head_dim, bias, qk_norm, use_rotary, scale: as in
            :class:`NeighborhoodAttention`. The averages are not turned by use_rotary.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: Sequence[int],
        pool_size: int | Sequence[int],
        *,
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        qk_norm: bool = False,
        use_rotary: bool = False,
        scale: float | None = None,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            kernel_size,
            stride=stride,
            dilation=dilation,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            bias=bias,
            qk_norm=qk_norm,
            use_rotary=use_rotary,
            scale=scale,
            context_dim=dim,
        )
        self.rank = len(kernel_size)
        pool = (pool_size,) * self.rank if isinstance(pool_size, int) else tuple(pool_size)
        if self.rank not in _POOL or len(pool) != self.rank or min(pool) < 1:
            raise ValueError(
                f"HiLoAttention: kernel_size is {kernel_size} and pool_size {pool_size}, "
                "expected 1 to 3 windows and a block of at least 1 in as many dimensions"
            )
        self.pool_size = pool

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``x [B, *X, dim]`` to the same shape."""
        if context is not None:
            raise ValueError("HiLoAttention: context is given, but its place is taken by the averages")
        if x.dim() != self.rank + 2:
            return super().forward(x)  # which says what is wrong
        blocks = _POOL[self.rank](
            x.movedim(-1, 1), self.pool_size, ceil_mode=True, count_include_pad=False
        )  # [B, dim, *X / pool]
        return super().forward(x, blocks.flatten(2).mT)
