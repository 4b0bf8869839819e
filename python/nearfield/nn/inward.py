"""Grids larger than those of the training: every query keeps the field of view it was trained with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nearfield.nn.neighborhood import NeighborhoodAttention


class InwardWindowAttention(NeighborhoodAttention):
    """Full attention on grids up to ``trained_size``, windows of that size on larger ones, without new parameters.

    A model trained with full attention on one grid degrades on a larger one, because its queries suddenly see more
    tokens and longer distances. Here the window of a larger grid has the size of the training grid and slides
    inwards at the borders, so every query sees exactly as many tokens, at distances it knows (rotary embedding
    depends on distances only). No retraining is needed, and the cost grows linearly with the area.

    Args:
        dim, num_heads: as in :class:`NeighborhoodAttention`.
        trained_size: the grid of the training; its length is the rank.
        stride: queries that share a window, one value or one per dimension; cut to the window's size.
        is_causal, num_kv_heads, head_dim, bias, qk_norm, scale, context_dim: as in :class:`NeighborhoodAttention`.
        use_rotary: on by default.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        trained_size: Sequence[int],
        *,
        stride: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        qk_norm: bool = False,
        use_rotary: bool = True,
        scale: float | None = None,
        context_dim: int | None = None,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            trained_size,
            is_causal=is_causal,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            bias=bias,
            qk_norm=qk_norm,
            use_rotary=use_rotary,
            scale=scale,
            context_dim=context_dim,
        )
        self.rank = len(trained_size)
        if self.rank not in (1, 2, 3) or min(trained_size) < 1:
            raise ValueError(
                f"InwardWindowAttention: trained_size is {trained_size}, expected 1 to 3 sizes of at least 1"
            )
        self.trained_size = tuple(trained_size)
        self.stride: tuple[int, ...] = (stride,) * self.rank if isinstance(stride, int) else tuple(stride)

    def window_and_stride(self, size: torch.Size) -> tuple[Sequence[int], Sequence[int]]:
        window = [min(trained, x) for trained, x in zip(self.trained_size, size, strict=True)]
        return window, [min(s, w) for s, w in zip(self.stride, window, strict=True)]
