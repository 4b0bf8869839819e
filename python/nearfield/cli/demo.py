"""Three small, complete uses of the operators, with a report (the same as python -m nearfield.demo)."""

from __future__ import annotations

import importlib.util

import typer

from nearfield.cli.refusal import Refused

NEEDED = {"skimage": "scikit-image", "sklearn": "scikit-learn"}  # of the extra `demo`, beyond the extra `cli`


def main(context: typer.Context) -> None:
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise Refused(f"the demo needs {' and '.join(missing)}; install with: pip install 'nearfield[demo]'")
    from nearfield.demo.__main__ import main as demo

    program = typer.Typer(add_completion=False)
    program.command()(demo)
    program(context.args, prog_name="python -m nearfield demo", standalone_mode=False)
