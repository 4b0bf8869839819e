"""Causal attention over the last tokens, with rotary embedding and a ring of keys and values for decoding."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nearfield.gna import neighborhood_attention
from nearfield.nn.kv_cache import RingCache
from nearfield.nn.projection import QKVProjection, check_heads
from nearfield.nn.rotary import rotary


class SlidingWindowAttention(nn.Module):
    """Every token attends to itself and the ``window - 1`` tokens before it.

    ``forward(x, cache=None)`` maps ``[B, T, dim]`` to the same; ``new_cache(batch)`` starts incremental decoding in
    memory for ``window`` tokens, however long the sequences grow.

    Args:
        dim: channels of input and output.
        num_heads: query heads.
        window: tokens that a query sees.
        num_kv_heads: heads of keys and values, a divisor of num_heads; default num_heads.
        head_dim: default ``dim / num_heads``; even.
        bias: whether the projections have one.
        qk_norm: RMS norm over each head of queries and keys.
        rotary_base: see :func:`rotary`; None: no position embedding.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        qk_norm: bool = False,
        rotary_base: float | None = 10000.0,
    ) -> None:
        super().__init__()
        kv_heads, head_dim = check_heads("SlidingWindowAttention", dim, num_heads, num_kv_heads, head_dim)
        if window < 1:
            raise ValueError(f"SlidingWindowAttention: window is {window}, expected at least 1")
        self.window, self.rotary_base = window, rotary_base
        self.qkv = QKVProjection(dim, num_heads, kv_heads, head_dim, bias)
        self.q_norm = nn.RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(num_heads * head_dim, dim, bias)

    def new_cache(self, batch: int) -> RingCache:
        """The memory before the first token, for ``batch`` sequences."""
        shape = (batch, self.window, self.qkv.heads[1], self.qkv.head_dim)
        return RingCache(self.qkv.weight.new_zeros(shape), self.qkv.weight.new_zeros(shape))

    def forward(self, x: Tensor, cache: RingCache | None = None) -> Tensor:
        """The next tokens ``x [B, T, dim]`` of B sequences.

        Args:
            x: tokens; without a cache the sequences begin with them.
            cache: of :meth:`new_cache`; the sequences go on from it, and it is brought up to date. No gradient
                flows through it into earlier calls.
        """
        if x.dim() != 3:
            raise ValueError(f"SlidingWindowAttention: x has shape {list(x.shape)}, expected [B, T, dim]")
        q, k, v = self.qkv.split(x)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary_base is not None:
            offset = 0 if cache is None else cache.length
            q, k = (rotary(t, offset=offset, base=self.rotary_base) for t in (q, k))
        if cache is not None and x.shape[1] == 1 and not torch.is_grad_enabled():
            cache.append(k, v)
            # All that the ring holds is visible, and attention does not care about its order.
            keys, values = cache.filled()
            q, keys, values = (t.transpose(1, 2) for t in (q, keys.to(q.dtype), values.to(q.dtype)))
            o = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True).transpose(1, 2)
        elif cache is None:
            o = self._attend(q, k, v)
        else:
            past_k, past_v = cache.past()
            keys, values = torch.cat([past_k.to(k.dtype), k], 1), torch.cat([past_v.to(v.dtype), v], 1)
            cache.append(k, v)
            # The operator wants a query per key; those of the past are zeros, and their results are dropped.
            past = past_k.shape[1]
            q = torch.cat([q.new_zeros(q.shape[0], past, *q.shape[2:]), q], 1)
            o = self._attend(q, keys, values)[:, past:]
        y: Tensor = self.proj(o.flatten(-2))
        return y

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = neighborhood_attention(q, k, v, min(self.window, q.shape[1]), is_causal=True)
        assert isinstance(o, Tensor)
        return o
