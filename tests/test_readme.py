"""The README's examples run, and its commands and files exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from nearfield import _C, _runtime

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_run(number: int) -> None:
    exec(compile(EXAMPLES[number], f"README.md, example {number + 1}", "exec"), {})


def test_every_operator_has_an_example() -> None:
    code = "\n".join(EXAMPLES)
    assert all(
        f"{name}(" in code for name in ("neighborhood_attention", "delta_rule", "local_linear_attention")
    )


def test_links_lead_somewhere() -> None:
    missing = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not (ROOT / link).exists()]
    assert not missing


def test_commands_are_targets() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^    make (\w+)$", README, re.MULTILINE)) <= targets


def test_build_variables_are_read() -> None:
    setup = (ROOT / "setup.py").read_text()
    variables = re.findall(r"^\| `([A-Z_]+)` \|", README, re.MULTILINE)
    assert variables
    assert all(f'"{name}"' in setup for name in variables)


COMPLETE = "90a" in _C.cuda_archs.split(";") and all(
    "cuda" in _runtime.devices_with_kernel(f"{family}_fwd") for family in ("gna", "delta", "lla")
)


@pytest.mark.skipif(not COMPLETE, reason="only a build of all families for 90a knows all kernels")
def test_the_table_of_kernels_is_that_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import support

    assert README == support.insert(README, support.table()), "out of date: run python docs/support.py"
