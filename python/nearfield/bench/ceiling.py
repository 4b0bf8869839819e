"""What this machine reaches at best, measured in the same run: the two lines of the roofline."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nearfield.bench.case import Work
from nearfield.bench.timing import time_ms


@dataclass(frozen=True)
class Ceiling:
    tflops: float  # of a large matrix product
    gbs: float  # read plus written, of a large copy

    def least_ms(self, work: Work) -> float:
        """No implementation is faster, whatever it overlaps."""
        return 1e3 * max(work.flops / (1e12 * self.tflops), work.bytes / (1e9 * self.gbs))


def measure_ceiling(device: torch.device, dtype: torch.dtype) -> Ceiling:
    side, size = (8192, 1 << 31) if device.type == "cuda" else (768, 1 << 26)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Ceiling(
        2 * side**3 / 1e9 / time_ms(lambda: a @ b, device=device),
        2 * size / 1e6 / time_ms(lambda: target.copy_(source), device=device),
    )
