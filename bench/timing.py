"""What the scripts of this folder share: nearfield.bench, results in bench/results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import typer
from nearfield.bench import groups, report, timing
from nearfield.bench.ceiling import measure_ceiling
from nearfield.bench.runner import run_group
from nearfield.bench.timing import header, host_us, time_ms

__all__ = ["RESULTS", "header", "host_us", "run_script", "save", "time_ms"]

RESULTS = Path(__file__).parent / "results"


def save(name: str, rows: list[dict[str, Any]], commit: str | None = None, **facts: Any) -> Path:
    """Writes ``results/<gpu>-<name>.json``; ``commit`` where the code was carried without its repository."""
    head = header() | facts
    return timing.save(RESULTS, name, head | {"commit": commit} if commit else head, rows)


def run_script(name: str, *, backward: bool, only: str, peers: bool, store: bool, commit: str) -> None:
    """One group on the GPU, printed as it goes."""
    if not torch.cuda.is_available():
        raise SystemExit("these are the cases of a GPU, and none is here; see python -m nearfield bench")
    device, group = torch.device("cuda"), groups()[name]
    ceiling = measure_ceiling(device, group.dtype)
    results = run_group(
        group, device, ceiling, only=only, passes=group.passes if backward else ("fwd",), peers=peers,
        report=lambda what: print(what, flush=True),
    )  # fmt: skip
    facts = {"ceiling_tflops": ceiling.tflops, "ceiling_gbs": ceiling.gbs, "checks": results.checks}
    print(report.markdown({"group": name, **header(), **facts, "rows": results.rows}))
    for text in [*(f"{what}: {why}" for what, why in results.refusals.items()), *results.failures]:
        print(text)
    if store and results.rows:
        print(save(name, results.rows, commit or None, **facts))
    if results.failures:
        raise typer.Exit(1)
