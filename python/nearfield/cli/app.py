"""The commands in one program, and the one place where errors become sentences."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer

from nearfield.cli import bench, demo, doctor, simulate
from nearfield.cli.refusal import Refused

# typer has its own click since 0.26; this finds the base of the usage errors in either.
ClickException: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(
    name="nearfield",
    help="Neighborhood attention, the delta rule and local linear attention: check, plan and measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("doctor")(doctor.main)
app.command("simulate")(simulate.main)
app.command("bench")(bench.main)
app.command(
    "demo",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
    help=demo.__doc__,
)(demo.main)


def run(arguments: Sequence[str] | None = None) -> int:
    command = typer.main.get_command(app)
    args = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = command.main(args, prog_name="python -m nearfield", standalone_mode=False)
    except ClickException as error:
        return _fail(error.format_message() or "no command given; see --help", error.exit_code)
    except Refused as error:
        return _fail(str(error), 2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", 1)
    except (typer.Abort, KeyboardInterrupt):
        return _fail("stopped", 130)
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int) -> int:
    print(f"nearfield: {' '.join(message.split())}", file=sys.stderr)
    return code
