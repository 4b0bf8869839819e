"""What is measured, and how. ``python -m nearfield bench`` and the scripts in ``bench/`` both run what is here.

A module of this package with a ``GROUP`` is a group of cases; adding a file adds it to both.
"""

from __future__ import annotations

import importlib
import pkgutil

from nearfield.bench.case import Group


def groups() -> dict[str, Group]:
    """By name, in the order of their ``rank``."""
    modules = (importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__))
    found = [module.GROUP for module in modules if hasattr(module, "GROUP")]
    return {group.name: group for group in sorted(found, key=lambda group: group.rank)}
