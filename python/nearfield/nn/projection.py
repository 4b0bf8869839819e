"""Queries, keys and values from one matrix product, as views of its result."""

from __future__ import annotations

from torch import Tensor, nn


def check_heads(
    what: str, dim: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None
) -> tuple[int, int]:
    """``(num_kv_heads, head_dim)`` with their defaults: as many as query heads, and ``dim / num_heads``."""
    if num_heads < 1 or dim < 1:
        raise ValueError(f"{what}: got dim {dim} and num_heads {num_heads}, expected at least 1 each")
    if head_dim is None:
        if dim % num_heads:
            raise ValueError(f"{what}: dim {dim} is no multiple of num_heads {num_heads}; pass head_dim")
        head_dim = dim // num_heads
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if kv_heads < 1 or num_heads % kv_heads:
        raise ValueError(f"{what}: num_heads {num_heads} is no multiple of num_kv_heads {kv_heads}")
    return kv_heads, head_dim


class QKVProjection(nn.Linear):
    """``[..., dim]`` to q ``[..., H, D]``, k ``[..., Hkv, D]`` and v ``[..., Hkv, D]``.

    The three are strided views of one result, which nearfield's kernels read in place. The rows of the weight are
    ordered q, k, v and by head inside, as in timm and NATTEN.
    """

    def __init__(
        self, dim: int, num_heads: int, num_kv_heads: int, head_dim: int, bias: bool = False
    ) -> None:
        super().__init__(dim, (num_heads + 2 * num_kv_heads) * head_dim, bias=bias)
        self.heads = (num_heads, num_kv_heads, num_kv_heads)
        self.head_dim = head_dim

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self(x).unflatten(-1, (-1, self.head_dim)).split(self.heads, -2)
        return q, k, v
