"""The command line: runs the parts, prints one table, writes the report."""

from __future__ import annotations

import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from nearfield.demo import denoise, recall, regression
from nearfield.demo.report import Result, write_report


class Part(str, Enum):
    denoise = "denoise"
    recall = "recall"
    regression = "regression"


RUN = {Part.denoise: denoise.run, Part.recall: recall.run, Part.regression: regression.run}


def main(
    parts: Annotated[list[Part] | None, typer.Argument(help="What to run; everything by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("out"),
    cpu: Annotated[bool, typer.Option("--cpu", help="Leave the GPU alone.")] = False,
) -> None:
    """Neighborhood attention denoises photographs, a DeltaNet learns to recall, local linear attention follows drift."""
    console = Console()
    if not console.is_terminal:
        console.width = 110  # a log has no width
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    results: list[Result] = []
    columns = (
        TextColumn("{task.description:<58}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for part in parts or list(Part):
            results.append(RUN[part](out, progress, not cpu))
    table = Table(title="nearfield demo", title_style="bold", header_style="bold")
    for heading in ("task", "method", "quality", "seconds", "ran on"):
        table.add_column(heading, justify="right" if heading in ("quality", "seconds") else "left")
    for result in results:
        for row in result.rows:
            cells = (
                row.task,
                row.method,
                row.quality,
                f"{row.seconds:.1f}" if row.seconds else "",
                row.device,
            )
            table.add_row(*cells, style="bold green" if row.ours else "")
        table.add_section()
    console.print(table)
    path = write_report(out, results)
    console.print(f"{time.perf_counter() - started:.0f} s in all. Report: {path}")


if __name__ == "__main__":
    typer.run(main)
