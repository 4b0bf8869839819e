"""What a group of cases has to say about itself."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from nearfield._accuracy import Accuracy

Pass = Literal["fwd", "bwd", "fwdbwd"]  # the output, its gradients, or both in one go
OURS = "nearfield"


@dataclass(frozen=True)
class Work:
    """The least that any implementation has to do."""

    flops: float
    bytes: float  # read and written once
    visited_flops: float = 0.0  # of ours, with what whole tiles add; 0: not known


@dataclass
class Contender:
    """One implementation of a case on its inputs."""

    name: str  # OURS or a peer's: a lower-case word, part of the keys of the results
    forward: Callable[[], Tensor]
    leaves: Sequence[Tensor] = ()  # require gradients
    gradient: Tensor | None = None  # of the output; none: it has a forward only
    same: Hashable = None  # equal for cases in which this one does the same work: it is timed once


class Case(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str:
        """The first case of each kind is checked before any of the kind is timed."""
        ...

    @property
    def targets(self) -> dict[Pass, float]:
        """Milliseconds on an H100 that we are out to reach."""
        ...

    def work(self, dtype: torch.dtype) -> dict[Pass, Work]:
        """Of the passes for which it is known."""
        ...

    def contenders(self, device: torch.device, dtype: torch.dtype) -> Iterator[Contender]:
        """Ours first, then the peers that are installed."""
        ...

    def check(self, device: torch.device, dtype: torch.dtype) -> dict[str, Accuracy]:
        """Ours on this very shape beside the reference: no speed without it."""
        ...

    def facts(self) -> dict[str, float]:
        """Further numbers for the row, such as a bound."""
        ...


@dataclass(frozen=True)
class Group:
    name: str  # a lower-case word
    title: str
    cases: Sequence[Case]  # for a GPU
    small: Sequence[Case]  # scaled down, for a CPU
    passes: tuple[Pass, ...]
    rank: int = 0
    dtype: torch.dtype = field(default=torch.bfloat16)  # on a GPU; CPUs get float32
