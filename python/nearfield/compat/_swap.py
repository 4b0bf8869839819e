"""Puts our functions in the place of another library's, wherever they were imported to, and back."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

Function = Callable[..., Any]


def _replace(pairs: Sequence[tuple[Function, Function]]) -> None:
    """In every loaded module, names of the first function of a pair come to mean the second."""
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType) or module.__name__.partition(".")[0] == "nearfield":
            continue
        for name, value in list(vars(module).items()):
            for old, new in pairs:
                if value is old:
                    setattr(module, name, new)


def _stand_in(function: Function) -> Function:
    @functools.wraps(function)
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return stand_in


class Swap:
    """One library's functions and ours; the library keeps its own until :meth:`install`."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Function, Function]] = []

    @property
    def installed(self) -> bool:
        return bool(self._pairs)

    def install(self, pairs: Sequence[tuple[Function, Function]]) -> None:
        """Pairs of the library's function and ours. Does nothing when something is installed."""
        if self._pairs:
            return
        # Stand-ins, so that on the way back a module that imported ours by itself keeps it.
        self._pairs = [(theirs, _stand_in(ours)) for theirs, ours in pairs]
        _replace(self._pairs)

    def remove(self) -> None:
        """The library's functions come back, also where they were imported from it in the meantime."""
        _replace([(ours, theirs) for theirs, ours in self._pairs])
        self._pairs = []
