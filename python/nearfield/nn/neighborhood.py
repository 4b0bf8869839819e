"""Neighborhood attention as a layer, for sequences, images and videos."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nearfield.gna import neighborhood_attention
from nearfield.nn.grid import GridLayer
from nearfield.nn.projection import QKVProjection, check_heads


class NeighborhoodAttention(GridLayer):
    """Every position of a grid attends to the window around it: projections and :func:`neighborhood_attention`.

    Input and output are ``[B, *X, dim]`` with one, two or three spatial dimensions X. Without grouped heads the parameters are
    named and shaped as in NATTEN's modules, so that its checkpoints load.

    Args:
        dim: channels of input and output.
        num_heads: query heads.
        kernel_size: window per dimension; -1: the whole dimension.
        stride, dilation, is_causal: as in :func:`neighborhood_attention`, one value or one per dimension.
        num_kv_heads: heads of keys and values, a divisor of num_heads; default num_heads.
        head_dim: default ``dim / num_heads``.
        bias: whether the projections have one.
        qk_norm: RMS norm over each head of queries and keys.
        use_rotary: turn queries and keys by their positions, see :func:`rotary`.
        scale: factor of the scores; default ``head_dim ** -0.5``.
        context_dim: channels of further tokens that every position sees (text, registers); None: there are none.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int],
        *,
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        qk_norm: bool = False,
        use_rotary: bool = False,
        scale: float | None = None,
        context_dim: int | None = None,
    ) -> None:
        super().__init__()
        what = type(self).__name__
        kv_heads, head_dim = check_heads(what, dim, num_heads, num_kv_heads, head_dim)
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation
        self.is_causal, self.scale, self.use_rotary = is_causal, scale, use_rotary
        self.qkv = QKVProjection(dim, num_heads, kv_heads, head_dim, bias)
        self.q_norm = nn.RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.context_kv = (
            None if context_dim is None else nn.Linear(context_dim, 2 * kv_heads * head_dim, bias)
        )
        self.proj = nn.Linear(num_heads * head_dim, dim, bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``x [B, *X, dim]``; ``context [B, M, context_dim]``: tokens that every position sees besides its window."""
        what = type(self).__name__
        q, k, v = self.heads_of(x)
        keys = values = None
        if context is not None:
            if self.context_kv is None:
                raise ValueError(f"{what}: context is given, but the layer was made without context_dim")
            keys, values = self.context_kv(context).unflatten(-1, (-1, self.qkv.head_dim)).chunk(2, -2)
            keys = self.k_norm(keys)
        window, stride = self.window_and_stride(x.shape[1:-1])
        o = neighborhood_attention(
            q,
            k,
            v,
            window,
            stride=stride,
            dilation=self.dilation,
            is_causal=self.is_causal,
            scale=self.scale,
            additional_keys=keys,
            additional_values=values,
        )
        assert isinstance(o, Tensor)
        y: Tensor = self.proj(o.flatten(-2))
        return y

    def window_and_stride(self, size: torch.Size) -> tuple[int | Sequence[int], int | Sequence[int]]:
        """What holds on a grid of this size."""
        return self.kernel_size, self.stride


class NeighborhoodAttention1D(NeighborhoodAttention):
    """Neighborhood attention of sequences, ``[B, T, dim]``. Arguments: :class:`NeighborhoodAttention`."""

    rank = 1


class NeighborhoodAttention2D(NeighborhoodAttention):
    """Neighborhood attention of images, ``[B, Y, X, dim]``. Arguments: :class:`NeighborhoodAttention`."""

    rank = 2


class NeighborhoodAttention3D(NeighborhoodAttention):
    """Neighborhood attention of videos, ``[B, T, Y, X, dim]``. Arguments: :class:`NeighborhoodAttention`."""

    rank = 3
