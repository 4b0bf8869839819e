"""The command line, ``python -m nearfield``: doctor, simulate, bench, demo. One file per command."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

NEEDED = ("typer", "rich", "matplotlib", "numpy")  # of the extra `cli`


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. What goes wrong is one sentence on stderr."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        message = (
            f"the command line needs {' and '.join(missing)}; install with: pip install 'nearfield[cli]'"
        )
        print(f"nearfield: {message}", file=sys.stderr)
        return 1
    from nearfield.cli.app import run

    return run(arguments)
