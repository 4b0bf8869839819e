"""A language-model block that remembers exactly nearby and in compressed form afar, in constant memory."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from nearfield.nn.delta_layer import DeltaCache
from nearfield.nn.gated_delta_net import GatedDeltaNet
from nearfield.nn.kv_cache import RingCache
from nearfield.nn.mlp import SwiGLU
from nearfield.nn.sliding_window import SlidingWindowAttention


@dataclass
class HybridCache:
    """What a block remembers of the tokens so far; its size does not depend on their number."""

    delta: DeltaCache
    window: RingCache


class HybridBlock(nn.Module):
    """Gated DeltaNet, MLP, sliding-window attention, MLP, each behind an RMS norm and with a residual connection.

    The hybrid H1 of the Gated DeltaNet paper (arXiv 2412.06464). ``forward(x, cache=None)`` maps ``[B, T, dim]`` to
    the same; ``new_cache(batch)`` starts a stream whose memory does not grow.

    Args:
        dim: channels.
        num_heads: heads of both mixers.
        window: tokens that the attention sees.
        head_dim: of both mixers; default ``dim / num_heads``.
        num_kv_heads: heads of keys and values of the attention; default num_heads.
        num_v_heads: value heads of the delta rule; default num_heads.
        head_v_dim: channels of a value of the delta rule; default ``2 head_dim``.
        mlp_hidden: default: 8/3 dim, rounded up to a multiple of 64.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        *,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        num_v_heads: int | None = None,
        head_v_dim: int | None = None,
        mlp_hidden: int | None = None,
    ) -> None:
        super().__init__()
        self.attention = SlidingWindowAttention(
            dim, num_heads, window, num_kv_heads=num_kv_heads, head_dim=head_dim, qk_norm=True
        )
        self.delta = GatedDeltaNet(
            dim,
            num_heads,
            head_dim=self.attention.qkv.head_dim,
            num_v_heads=num_v_heads,
            head_v_dim=head_v_dim,
        )
        hidden = -(-8 * dim // 3 // 64) * 64 if mlp_hidden is None else mlp_hidden
        self.delta_mlp, self.attention_mlp = SwiGLU(dim, hidden), SwiGLU(dim, hidden)
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(4))

    def new_cache(self, batch: int) -> HybridCache:
        """The memory before the first token, for ``batch`` sequences."""
        return HybridCache(self.delta.new_cache(batch), self.attention.new_cache(batch))

    def forward(self, x: Tensor, cache: HybridCache | None = None) -> Tensor:
        """The next tokens ``x [B, T, dim]`` of B sequences, which go on from the cache, or begin without one."""
        x = x + self.delta(self.norms[0](x), None if cache is None else cache.delta)
        x = x + self.delta_mlp(self.norms[1](x))
        x = x + self.attention(self.norms[2](x), None if cache is None else cache.window)
        x = x + self.attention_mlp(self.norms[3](x))
        return x
