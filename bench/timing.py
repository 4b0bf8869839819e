"""What the scripts of this folder share: nearfield.bench, results in bench/results."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from nearfield.bench import groups, report, timing
from nearfield.bench.ceiling import measure_ceiling
from nearfield.bench.runner import Results, run_group
from nearfield.bench.timing import header, time_ms

__all__ = ["RESULTS", "header", "run", "save", "script", "time_ms"]

RESULTS = Path(__file__).parent / "results"


def run(main: Callable[..., None]) -> None:
    """A script's command line; a wrong file is one sentence."""
    try:
        typer.run(main)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None


def save(
    name: str,
    rows: list[dict[str, Any]],
    *,
    into: Path = RESULTS,
    device: torch.device | str = "cuda",
    **facts: Any,
) -> Path:
    """Writes ``results/<gpu>-<name>.json``; ``facts`` win over what the header finds."""
    return timing.save(into, name, header(device) | facts, rows)


def script(name: str) -> None:
    """The command line of one group."""

    def main(
        backward: Annotated[bool, typer.Option(help="Time gradients too.")] = False,
        only: Annotated[str, typer.Option(help="Cases whose name holds this text.")] = "",
        with_peer: Annotated[
            bool,
            typer.Option("--with-peer/--no-peers", help="Time other implementations that are installed."),
        ] = True,
        store: Annotated[bool, typer.Option(help=f"Write bench/results/<gpu>-{name}.json.")] = False,
        commit: Annotated[str, typer.Option(help="Where the code was carried without its repository.")] = "",
    ) -> None:
        run_script(name, backward=backward, only=only, peers=with_peer, store=store, commit=commit)

    run(main)


def run_script(name: str, *, backward: bool, only: str, peers: bool, store: bool, commit: str) -> None:
    """One group on the GPU, printed as it goes."""
    if not torch.cuda.is_available():
        raise SystemExit("these are the cases of a GPU, and none is here; see python -m nearfield bench")
    device, group = torch.device("cuda"), groups()[name]
    ceiling = measure_ceiling(device, group.dtype)
    facts: dict[str, Any] = {"ceiling_tflops": ceiling.tflops, "ceiling_gbs": ceiling.gbs}
    facts |= {"commit": commit} if commit else {}

    def keep(results: Results) -> None:
        """After each case: a run that is cut short leaves what it measured."""
        if store:
            save(name, results.rows, **facts, checks=results.checks)

    results = run_group(
        group, device, ceiling, only=only, passes=group.passes if backward else ("fwd",), peers=peers,
        report=lambda what: print(what, flush=True), keep=keep,
    )  # fmt: skip
    print(report.markdown({"group": name, **header(), **facts, "rows": results.rows}))
    for text in [*(f"{what}: {why}" for what, why in results.refusals.items()), *results.failures]:
        print(text)
    if store and results.rows:
        print(timing.result_path(RESULTS, name, header()))
    if results.failures:
        raise typer.Exit(1)
