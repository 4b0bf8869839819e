"""The models of the examples: equal stacks that differ in one line, the mixer over time."""

from __future__ import annotations

from collections.abc import Callable

from nearfield.nn import (
    DeltaNet,
    GatedDeltaNet,
    LocalLinearAttention,
    ShortConvolution,
    SlidingWindowAttention,
    SwiGLU,
)
from taylor import TaylorLinearAttention
from torch import Tensor, nn

WINDOW = 16
"""Tokens that the sliding window sees."""

EVERYTHING = 1 << 30

# Every block has a short convolution in front, so those of the delta layers are left out.
MIXERS: dict[str, Callable[[int, int], nn.Module]] = {
    "softmax": lambda dim, heads: SlidingWindowAttention(dim, heads, EVERYTHING),
    "window": lambda dim, heads: SlidingWindowAttention(dim, heads, WINDOW),
    "taylor": TaylorLinearAttention,
    "deltanet": lambda dim, heads: DeltaNet(dim, heads, conv_size=1),
    "gdn": lambda dim, heads: GatedDeltaNet(
        dim, heads, head_dim=dim // heads, head_v_dim=dim // heads, conv_size=1
    ),
    "lla": lambda dim, heads: LocalLinearAttention(dim, heads, tol=1e-2),
}


class Block(nn.Module):
    """Short convolution and mixer, then an MLP if there is one, each behind an RMS norm and with a residual."""

    def __init__(self, mixer: str, dim: int, heads: int, mlp: bool) -> None:
        super().__init__()
        self.norm, self.mixer = nn.RMSNorm(dim), MIXERS[mixer](dim, heads)
        self.conv = ShortConvolution(dim, 3)
        self.mlp = nn.Sequential(nn.RMSNorm(dim), SwiGLU(dim, 2 * dim)) if mlp else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.conv(self.norm(x)))
        return x if self.mlp is None else x + self.mlp(x)


class Stack(nn.Sequential):
    """Blocks and a closing norm, ``[B, T, dim]`` to the same."""

    def __init__(self, mixer: str, dim: int, layers: int, heads: int = 1, mlp: bool = False) -> None:
        super().__init__(*(Block(mixer, dim, heads, mlp) for _ in range(layers)), nn.RMSNorm(dim))
