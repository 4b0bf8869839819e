"""Local linear attention as a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nearfield.lla import local_linear_attention, local_linear_attention_step
from nearfield.nn.kv_cache import KVCache
from nearfield.nn.projection import QKVProjection, check_heads
from nearfield.nn.ridge import LearnedRidge

_MOST_STEP = 8
"""Up to so many new tokens the direct solver is used, which forms a matrix per query; above, conjugate gradients."""


class LocalLinearAttention(LearnedRidge):
    """Causal local linear attention (arXiv 2510.01450) with a learned ridge per head, ``softplus(theta) + lam_min``.

    ``forward(x, cache=None)`` maps ``[B, T, dim]`` to the same; ``new_cache(batch, capacity)`` starts incremental
    decoding.

    Args:
        dim: channels of input and output.
        num_heads: query heads.
        num_kv_heads: heads of keys and values, a divisor of num_heads; default num_heads.
        head_dim: default ``dim / num_heads``.
        bias: whether the projections have one.
        qk_norm: RMS norm over each head of queries and keys. With it the ridge has a scale that does not drift.
        lam: ridge at the beginning, above lam_min, in units of |k|^2: 0.03 fits closely, 10 is nearly softmax.
        lam_min: lower bound of the ridge; below about 0.01 the solver needs many steps.
        window: number of last tokens a query sees; None: all.
        scale: kernel bandwidth; default ``head_dim ** -0.5``.
        tol, max_iters: of the solver, see :func:`local_linear_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        qk_norm: bool = True,
        lam: float = 1.0,
        lam_min: float = 0.01,
        window: int | None = None,
        scale: float | None = None,
        tol: float = 1e-3,
        max_iters: int = 16,
    ) -> None:
        super().__init__()
        kv_heads, head_dim = check_heads("LocalLinearAttention", dim, num_heads, num_kv_heads, head_dim)
        self.window, self.scale, self.tol, self.max_iters = window, scale, tol, max_iters
        self.qkv = QKVProjection(dim, num_heads, kv_heads, head_dim, bias)
        self.q_norm = nn.RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.begin_ridge(num_heads, lam, lam_min)
        self.proj = nn.Linear(num_heads * head_dim, dim, bias)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """Memory for ``capacity`` tokens of ``batch`` sequences."""
        shape = (batch, capacity, self.qkv.heads[1], self.qkv.head_dim)
        return KVCache(self.qkv.weight.new_zeros(shape), self.qkv.weight.new_zeros(shape))

    def forward(self, x: Tensor, cache: KVCache | None = None, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """The next tokens ``x [B, T, dim]`` of B sequences.

        Args:
            x: tokens; without a cache the sequences begin with them.
            cache: of :meth:`new_cache`; the sequences go on from it, and the keys and values are added to it. With
                a cache there is no gradient: call it under ``torch.no_grad()``.
            cu_seqlens: x is ``[1, T, dim]`` and holds packed sequences, see :func:`local_linear_attention`; without
                a cache.
        """
        if x.dim() != 3:
            raise ValueError(f"LocalLinearAttention: x has shape {list(x.shape)}, expected [B, T, dim]")
        if cache is not None and torch.is_grad_enabled():
            raise ValueError(
                "LocalLinearAttention: decoding with a cache has no gradient; call it under torch.no_grad()"
            )
        if cache is not None and cu_seqlens is not None:
            raise ValueError("LocalLinearAttention: cu_seqlens was given with a cache, expected one of them")
        q, k, v = self.qkv.split(x)
        q, k = self.q_norm(q), self.k_norm(k)
        if cache is not None:
            k, v = (t.to(q.dtype) for t in cache.append(k, v))
        if cache is not None and x.shape[1] <= _MOST_STEP:
            o = local_linear_attention_step(q, k, v, lam=self.lam, scale=self.scale, window=self.window)
        else:
            o = local_linear_attention(
                q,
                k,
                v,
                lam=self.lam,
                scale=self.scale,
                window=self.window,
                tol=self.tol,
                max_iters=self.max_iters,
                cu_seqlens=cu_seqlens,
            )
        y: Tensor = self.proj(o.flatten(-2))
        return y
