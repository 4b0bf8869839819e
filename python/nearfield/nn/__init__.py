"""Layers: neighborhood attention, DeltaNet and local linear attention as `torch.nn` modules, with decoding."""

from nearfield.nn.delta_layer import DeltaCache
from nearfield.nn.delta_net import DeltaNet
from nearfield.nn.gated_delta_net import GatedDeltaNet
from nearfield.nn.hilo import HiLoAttention
from nearfield.nn.hybrid import HybridBlock, HybridCache
from nearfield.nn.inward import InwardWindowAttention
from nearfield.nn.kv_cache import KVCache, RingCache
from nearfield.nn.local_linear import LocalLinearAttention
from nearfield.nn.mlp import SwiGLU
from nearfield.nn.neighborhood import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)
from nearfield.nn.neighborhood_local_linear import (
    NeighborhoodLocalLinearAttention1D,
    NeighborhoodLocalLinearAttention2D,
    NeighborhoodLocalLinearAttention3D,
)
from nearfield.nn.rotary import rotary
from nearfield.nn.short_convolution import ShortConvolution
from nearfield.nn.sliding_window import SlidingWindowAttention

__all__ = [
    "DeltaCache",
    "DeltaNet",
    "GatedDeltaNet",
    "HiLoAttention",
    "HybridBlock",
    "HybridCache",
    "InwardWindowAttention",
    "KVCache",
    "LocalLinearAttention",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "NeighborhoodLocalLinearAttention1D",
    "NeighborhoodLocalLinearAttention2D",
    "NeighborhoodLocalLinearAttention3D",
    "RingCache",
    "ShortConvolution",
    "SlidingWindowAttention",
    "SwiGLU",
    "rotary",
]
