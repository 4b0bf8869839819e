"""The command line in this process, and what a refusal looks like."""

from __future__ import annotations

import contextlib
import io

from nearfield.cli import app

Outcome = tuple[int, str, str]


def run(*arguments: str) -> Outcome:
    """Exit code, stdout, stderr."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = app.run(arguments)
    return code, out.getvalue(), err.getvalue()


def assert_refused(outcome: Outcome, message: str) -> None:
    """One sentence on stderr, nothing on stdout, a code that says so."""
    code, out, err = outcome
    assert code != 0
    assert out == ""
    assert err.startswith("nearfield: ")
    assert err.count("\n") == 1
    assert message in err
