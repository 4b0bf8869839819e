"""Keys and values of the past: all of them, or those a window still sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class KVCache:
    """Keys and values of all tokens so far, in memory for a fixed number."""

    k: Tensor
    """``[B, capacity, Hkv, D]``; the first ``length`` tokens are filled."""
    v: Tensor
    length: int = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the tokens ``[B, T, Hkv, D]`` and returns views of all keys and values."""
        end = self.length + k.shape[1]
        if end > self.k.shape[1]:
            raise ValueError(f"KVCache: {end} tokens do not fit into a capacity of {self.k.shape[1]}")
        self.k[:, self.length : end] = k.detach()
        self.v[:, self.length : end] = v.detach()
        self.length = end
        return self.k[:, :end], self.v[:, :end]


@dataclass
class RingCache:
    """Keys and values of the last tokens of a sequence: token t lies in slot ``t % window``."""

    k: Tensor
    """``[B, window, Hkv, D]``."""
    v: Tensor
    length: int = 0
    """Tokens seen so far, overwritten ones included."""

    @property
    def window(self) -> int:
        return self.k.shape[1]

    def filled(self) -> tuple[Tensor, Tensor]:
        """Views of the keys and values that are there, in the order of their slots."""
        n = min(self.length, self.window)
        return self.k[:, :n], self.v[:, :n]

    def past(self) -> tuple[Tensor, Tensor]:
        """Keys and values before the next token, oldest first: what a window that ends at it sees of the past."""
        n = min(self.length, self.window - 1)
        slots = torch.arange(self.length - n, self.length, device=self.k.device) % self.window
        return self.k[:, slots], self.v[:, slots]

    def append(self, k: Tensor, v: Tensor) -> None:
        """Adds the tokens ``[B, T, Hkv, D]``, over the oldest."""
        end = self.length + k.shape[1]
        kept = min(k.shape[1], self.window)
        slots = torch.arange(end - kept, end, device=k.device) % self.window
        self.k[:, slots] = k[:, k.shape[1] - kept :].detach().to(self.k.dtype)
        self.v[:, slots] = v[:, v.shape[1] - kept :].detach().to(self.v.dtype)
        self.length = end
