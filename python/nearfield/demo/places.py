"""Where an operator runs: on the GPU if this build has a kernel for it and the data type, else on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import rich
import torch
from rich.markup import escape


class Place(NamedTuple):
    device: torch.device
    dtype: torch.dtype

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return f"{name}, {str(self.dtype).removeprefix('torch.')}"


CPU = Place(torch.device("cpu"), torch.float32)


def choose(attempt: Callable[[Place], object], gpu_dtypes: Iterable[torch.dtype], use_gpu: bool) -> Place:
    """The first place where a tiny ``attempt`` runs. Why another one was passed over is printed."""
    if use_gpu and torch.cuda.is_available():
        for dtype in gpu_dtypes:
            place = Place(torch.device("cuda"), dtype)
            try:
                attempt(place)
            except RuntimeError as error:  # NotImplementedError is one of them
                rich.print(escape(f"not on {place}: {str(error).splitlines()[0]}"))
                continue
            return place
    return CPU


def wait(place: Place) -> None:
    """Kernels run behind Python's back; a clock must wait for them."""
    if place.device.type == "cuda":
        torch.cuda.synchronize()
