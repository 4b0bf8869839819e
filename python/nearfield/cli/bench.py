"""``bench``: checks, then times the groups of ``nearfield.bench``; writes JSON, Markdown and a plot of each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from nearfield._files import folder
from nearfield.bench import groups as all_groups
from nearfield.bench import report
from nearfield.bench.case import Group, Pass
from nearfield.bench.ceiling import Ceiling, measure_ceiling
from nearfield.bench.runner import Results, run_group, select
from nearfield.bench.timing import header, save
from nearfield.cli.refusal import Refused


def main(
    groups: Annotated[list[str] | None, typer.Argument(help="What to run; everything by default.")] = None,
    only: Annotated[str, typer.Option(help="Cases whose name holds this text.")] = "",
    backward: Annotated[bool, typer.Option(help="Time gradients too.")] = True,
    peers: Annotated[bool, typer.Option(help="Time other implementations that are installed.")] = True,
    cpu: Annotated[bool, typer.Option("--cpu", help="Scaled-down cases, leave the GPU alone.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("out/bench"),
    list_cases: Annotated[bool, typer.Option("--list", help="Name the cases and stop.")] = False,
) -> None:
    """Time the operators beside other implementations, after a check against the reference.

    Each group writes a JSON file, a Markdown table and a plot. Without a GPU the cases are scaled down.
    """
    device = torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
    chosen = choose(groups, device, only)
    console = Console()
    if not console.is_terminal:
        console.width = 140
    if list_cases:
        for group in chosen:
            console.print(f"[bold]{group.name}[/]  {group.title}")
            for case in select(group, device, only):
                console.print(f"    {case.name}", markup=False, highlight=False)
        return
    if out.exists() and not out.is_dir():
        raise Refused(f"out is {out}, which is a file; a folder is expected")
    if device.type == "cpu":
        why = "--cpu is given" if torch.cuda.is_available() else "no GPU is here"
        console.print(
            f"{why}: scaled-down cases on the CPU, in float32. They say nothing about a GPU.", style="yellow"
        )
    failed = False
    columns = (TextColumn("{task.description:<52}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # The folder is made before minutes of measuring that could not be kept.
    with folder(out), Progress(*columns, console=console) as progress:
        bar = progress.add_task(
            "what this machine reaches", total=sum(steps(g, device, only) for g in chosen) + 1
        )
        ceilings: dict[torch.dtype, Ceiling] = {}

        def advance(what: str) -> None:
            progress.update(bar, description=what[:52], advance=1)

        for group in chosen:
            dtype = torch.float32 if device.type == "cpu" else group.dtype
            if dtype not in ceilings:
                ceilings[dtype] = measure_ceiling(device, dtype)
            passes: tuple[Pass, ...] = group.passes if backward else ("fwd",)
            results = run_group(
                group, device, ceilings[dtype], only=only, passes=passes, peers=peers, report=advance
            )
            failed |= bool(results.failures)
            show(console, progress, group, results, write(out, group, results, device, ceilings[dtype]))
        progress.update(bar, description="done", advance=1)
    if failed:
        raise typer.Exit(1)


def choose(names: list[str] | None, device: torch.device, only: str) -> list[Group]:
    known = all_groups()
    if unknown := [name for name in names or [] if name not in known]:
        raise Refused(f"no group is named {', '.join(unknown)}; there are: {', '.join(known)}")
    chosen = [known[name] for name in dict.fromkeys(names or known)]
    chosen = [group for group in chosen if select(group, device, only)]
    if not chosen:
        raise Refused(f"no case of these groups has {only} in its name; see --list")
    return chosen


def steps(group: Group, device: torch.device, only: str) -> int:
    cases = select(group, device, only)
    return len(cases) + len({case.kind for case in cases})


def write(out: Path, group: Group, results: Results, device: torch.device, ceiling: Ceiling) -> Path | None:
    if not results.rows:
        return None
    head = header(device) | {
        "ceiling_tflops": ceiling.tflops,
        "ceiling_gbs": ceiling.gbs,
        "checks": results.checks,
    }
    if device.type == "cpu":
        head["scaled_down"] = True
    path = save(out, group.name, head, results.rows)
    report.write_beside(path, group.title)
    return path


def show(console: Console, progress: Progress, group: Group, results: Results, path: Path | None) -> None:
    for kind, check in results.checks.items():
        progress.console.print(
            f"{kind}: right ({check['part']} is off by {check['error']:.1e}, allowed is {check['allowed']:.1e})",
            style="green", markup=False, highlight=False,
        )  # fmt: skip
    for what, why in results.refusals.items():
        progress.console.print(f"{what}: not here: {why}", style="dim", markup=False, highlight=False)
    for failure in results.failures:
        progress.console.print(f"problem: {failure}", style="bold red", markup=False, highlight=False)
    if path is None:
        return
    data = report.load(path)
    for name, title in report.PASSES.items():
        headings, cells = report.table(data, name)
        if cells:
            table = Table(title=f"{group.title}, {title}", title_justify="left")
            for i, heading in enumerate(headings):
                table.add_column(heading, justify="right" if i else "left")
            for line in cells:
                table.add_row(*line)
            progress.console.print(table)
    progress.console.print(f"{path}, with .md and .png beside it", markup=False, highlight=False)
