"""Local linear attention on a grid as a layer, for sequences, images and videos."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from nearfield.lla import neighborhood_local_linear_attention
from nearfield.nn.grid import GridLayer
from nearfield.nn.projection import QKVProjection, check_heads
from nearfield.nn.ridge import LearnedRidge


class NeighborhoodLocalLinearAttention(GridLayer, LearnedRidge):
    """Every position of a grid fits the window around it: projections and :func:`neighborhood_local_linear_attention`.

    Input and output are ``[B, *X, dim]`` with one, two or three spatial dimensions X. The ridge is learned per head,
    ``softplus(theta) + lam_min``.

    Args:
        dim: channels of input and output.
        num_heads: query heads.
        kernel_size: window per dimension; -1: the whole dimension.
        stride, dilation, is_causal: as in :func:`neighborhood_attention`, one value or one per dimension.
        num_kv_heads: heads of keys and values, a divisor of num_heads; default num_heads.
        head_dim: default ``dim / num_heads``.
        bias: whether the projections have one.
        qk_norm: RMS norm over each head of queries and keys. With it the ridge has a scale that does not drift.
        use_rotary: turn queries and keys by their positions, see :func:`rotary`.
        lam: ridge at the beginning, above lam_min, in units of |k|^2: 0.03 fits closely, 10 is nearly softmax. A window
            of fewer positions than ``head_dim`` wants it well above 0.
        lam_min: lower bound of the ridge; below about 0.01 the solver needs many steps.
        scale: kernel bandwidth; default ``head_dim ** -0.5``.
        tol, max_iters: of the solver, see :func:`local_linear_attention`.
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
        bias: bool = False,
        qk_norm: bool = True,
        use_rotary: bool = False,
        lam: float = 1.0,
        lam_min: float = 0.01,
        scale: float | None = None,
        tol: float = 1e-3,
        max_iters: int = 16,
    ) -> None:
        super().__init__()
        kv_heads, head_dim = check_heads(type(self).__name__, dim, num_heads, num_kv_heads, head_dim)
        self.kernel_size, self.stride, self.dilation, self.is_causal = (
            kernel_size,
            stride,
            dilation,
            is_causal,
        )
        self.use_rotary, self.scale, self.tol, self.max_iters = use_rotary, scale, tol, max_iters
        self.qkv = QKVProjection(dim, num_heads, kv_heads, head_dim, bias)
        self.q_norm = nn.RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.begin_ridge(num_heads, lam, lam_min)
        self.proj = nn.Linear(num_heads * head_dim, dim, bias)

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, *X, dim]`` to the same shape."""
        q, k, v = self.heads_of(x)
        o = neighborhood_local_linear_attention(
            q,
            k,
            v,
            self.kernel_size,
            lam=self.lam,
            stride=self.stride,
            dilation=self.dilation,
            is_causal=self.is_causal,
            scale=self.scale,
            tol=self.tol,
            max_iters=self.max_iters,
        )
        y: Tensor = self.proj(o.flatten(-2))
        return y


class NeighborhoodLocalLinearAttention1D(NeighborhoodLocalLinearAttention):
    """Local fits in sequences, ``[B, T, dim]``. Arguments: :class:`NeighborhoodLocalLinearAttention`."""

    rank = 1


class NeighborhoodLocalLinearAttention2D(NeighborhoodLocalLinearAttention):
    """Local fits in images, ``[B, Y, X, dim]``. Arguments: :class:`NeighborhoodLocalLinearAttention`."""

    rank = 2


class NeighborhoodLocalLinearAttention3D(NeighborhoodLocalLinearAttention):
    """Local fits in videos, ``[B, T, Y, X, dim]``. Arguments: :class:`NeighborhoodLocalLinearAttention`."""

    rank = 3
