"""What the layers over windows of a grid share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from nearfield.nn.projection import QKVProjection
from nearfield.nn.rotary import rotary


class GridLayer(nn.Module):
    """Windows of a grid, and the queries, keys and values that meet in them. Derived classes make the parts."""

    rank: int
    """Number of spatial dimensions, 1 to 3; the derived classes know it."""
    kernel_size: int | Sequence[int]
    stride: int | Sequence[int]
    dilation: int | Sequence[int]
    is_causal: bool | Sequence[bool]
    use_rotary: bool
    qkv: QKVProjection
    q_norm: nn.Module
    k_norm: nn.Module

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x [B, *X, dim]`` to q, k and v, ``[B, *X, H, head_dim]``."""
        if x.dim() != self.rank + 2:
            raise ValueError(
                f"{type(self).__name__}: x has shape {list(x.shape)}, expected [B, {'X, ' * self.rank}dim]"
            )
        q, k, v = self.qkv.split(x)
        q, k = self.q_norm(q), self.k_norm(k)
        return (rotary(q), rotary(k), v) if self.use_rotary else (q, k, v)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}, is_causal={self.is_causal}"
