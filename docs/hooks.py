"""What the pages take from the code when they are built: pictures, and tables of the results that are there.

A page asks by a comment: ``<!-- bench: gna -->`` for the results of a group, ``<!-- version -->``. Pictures are named
as files in ``pictures/`` and drawn by the function of that name in pictures.py.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from nearfield import __version__
from nearfield.bench import groups, report

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(DOCS))
import pictures  # noqa: E402

SCRIPTS = {"models": "python bench/models.py --store"}  # what measures results that are of no group

BENCH = re.compile(r"<!-- bench: (\w+) -->")


def on_files(files: Files, config: Any) -> Files:
    for name, draw in pictures.PICTURES.items():
        files.append(File.generated(config, f"pictures/{name}.png", content=draw()))
    for path in result_files():
        data = report.load(path)
        picture = report.plot(data, data.get("title") or title(data["group"]))
        files.append(File.generated(config, f"pictures/{path.stem}.png", content=picture))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    markdown = BENCH.sub(lambda match: results(match[1], page), markdown)
    return markdown.replace("<!-- version -->", __version__)


def family(name: str) -> str:
    """The group of results: those of a variant, say of other kernels, are named gna-variant."""
    return name.split("-")[0]


def title(name: str) -> str:
    """What the plot of some results is called."""
    known = groups().get(family(name))
    return name if known is None or known.name != name else known.title


def result_files() -> list[Path]:
    return sorted((ROOT / "bench" / "results").glob("*.json"))


def results(group: str, page: Any) -> str:
    """Table and plot of every result file of a group, or the sentence that there is none."""
    if group not in groups() and group not in SCRIPTS:
        raise ValueError(f"{page.file.src_path}: no group of benchmarks is named {group}")
    up = "../" * page.file.src_path.count("/")
    found = []
    for path in result_files():
        data = report.load(path)
        if family(data["group"]) == group:
            found.append(f"{report.markdown(data)}\n![Speedups]({up}pictures/{path.stem}.png)\n")
    command = SCRIPTS.get(group, f"python -m nearfield bench {group} --out bench/results")
    return "\n".join(found) or f"Nobody has stored results of this yet. To measure: `{command}`."
