"""``doctor``: what this build holds, what runs where on this machine, and whether the first calls are right.

Nothing here is a list kept by hand: operators come from PyTorch's dispatcher, what a device takes from calling it.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

import nearfield
from nearfield import _C, _runtime  # type: ignore[attr-defined]
from nearfield._accuracy import worst
from nearfield.cli.checks import CHECKS


@dataclass(frozen=True)
class Outcome:
    """One operator on one device in one dtype."""

    operator: str
    device: str
    dtype: str
    status: str  # right, wrong, failed, refused, no kernel, unchecked
    error: float | None = None  # of the worst part, as a share of the largest value; None too if infinite
    allowed: float | None = None
    part: str = ""
    message: str = ""

    @property
    def is_problem(self) -> bool:
        return self.status in ("wrong", "failed", "unchecked")


def main(
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
) -> None:
    """Say what was built, what runs where, and call every operator beside its reference."""
    console = Console(stderr=as_json)
    if not console.is_terminal:
        console.width = 120
    build, gpus = describe_build(), describe_gpus()
    problems = [text for gpu in gpus for text in gpu_problems(gpu, build["cuda architectures"])]
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("first calls", total=None)
        outcomes = list(first_calls(lambda done, total: progress.update(bar, completed=done, total=total)))
    problems += [
        f"{o.operator} on {o.device} in {o.dtype}: {o.status}{': ' * bool(o.message)}{o.message}"
        for o in outcomes if o.is_problem
    ]  # fmt: skip
    if as_json:
        report = {
            "build": build,
            "gpus": gpus,
            "operators": [asdict(o) for o in outcomes],
            "problems": problems,
        }
        print(json.dumps(report, indent=1))
    else:
        show(console, build, gpus, outcomes, problems)
    if problems:
        raise typer.Exit(1)


def operators() -> list[str]:
    """Names in ``torch.ops.nearfield``, as the dispatcher knows them; without those that only plan."""
    names = torch._C._dispatch_get_all_op_names()
    ours = {n.removeprefix("nearfield::").split(".")[0] for n in names if n.startswith("nearfield::")}
    return sorted(n for n in ours if _runtime.devices_with_kernel(n) & {"cpu", "cuda"})


def describe_build() -> dict[str, str]:
    on_cuda = {n.split("_")[0] for n in operators() if "cuda" in _runtime.devices_with_kernel(n)}
    try:
        from nearfield import _planner  # noqa: F401

        planner = "yes"
    except ImportError:
        planner = "not in this build: no `simulate`"
    return {
        "nearfield": nearfield.__version__,
        "families": ", ".join(sorted({n.split("_")[0] for n in operators()})),
        "families with CUDA kernels": ", ".join(sorted(on_cuda)) or "none",
        "cuda architectures": _C.cuda_archs or "none",
        "built with": ", ".join([f"torch {_C.torch_version}", *([f"CUDA {_C.cuda_version}"] * bool(_C.cuda_version))]),
        "planner": planner,
        "running": f"torch {torch.__version__}, Python {platform.python_version()}",
        "torch's CUDA": torch.version.cuda or "none",
    }  # fmt: skip


def describe_gpus() -> list[dict[str, str]]:
    if not torch.cuda.is_available():
        return []
    found = []
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        found.append(
            {
                "device": f"cuda:{i}",
                "name": gpu.name,
                "capability": f"{gpu.major}.{gpu.minor}",
                "memory": f"{gpu.total_memory / 2**30:.0f} GiB",
                "multiprocessors": str(gpu.multi_processor_count),
            }
        )
    return found


def serves(arch: str, capability: str) -> bool:
    """Machine code for ``80`` runs on 8.x from 8.0 on; for ``90a`` on 9.0 alone."""
    major, minor = (int(part) for part in capability.split("."))
    digits = arch.rstrip("af")
    if arch != digits:
        return digits == f"{major}{minor}"
    return int(digits[:-1]) == major and int(digits[-1]) <= minor


def gpu_problems(gpu: dict[str, str], archs: str) -> Iterator[str]:
    name = f"{gpu['device']} ({gpu['name']}, compute capability {gpu['capability']})"
    if archs == "none":
        yield f"{name} is idle: this build has no CUDA kernels; build with nvcc on PATH"
    elif not any(serves(arch, gpu["capability"]) for arch in archs.split(";")):
        yield f"{name} is not served by a build for {archs}; build with NEARFIELD_CUDA_ARCHS set to it"


def first_calls(report: Callable[[int, int], None]) -> Iterator[Outcome]:
    devices = ["cpu", *(gpu["device"] for gpu in describe_gpus())]
    calls = [(o, d, t) for o in operators() for d in devices for t in _runtime.FLOAT_DTYPES]
    for done, (operator, device, dtype) in enumerate(calls):
        report(done, len(calls))
        yield first_call(operator, torch.device(device), dtype)


def first_call(operator: str, device: torch.device, dtype: torch.dtype) -> Outcome:
    names: dict[str, Any] = {
        "operator": operator,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
    }
    if device.type not in _runtime.devices_with_kernel(operator):
        return Outcome(**names, status="no kernel")
    if operator not in CHECKS:
        return Outcome(**names, status="unchecked", message="nearfield/cli/checks.py has no check of it")
    try:
        part, accuracy = worst(CHECKS[operator](device, dtype))
    except (RuntimeError, ValueError, TypeError) as raised:  # NotImplementedError is a RuntimeError
        message = _runtime.sentence(raised)
        return Outcome(
            **names, status="refused" if _runtime.is_refusal(raised) else "failed", message=message
        )
    status = "right" if accuracy.ok else "wrong"
    error = accuracy.error if math.isfinite(accuracy.error) else None  # JSON has no infinity
    numbers: dict[str, Any] = {"error": error, "allowed": accuracy.allowed, "part": part}
    message = (
        "" if accuracy.ok else f"{part} is off by {accuracy.error:.2g}, allowed is {accuracy.allowed:.2g}"
    )
    return Outcome(**names, status=status, message=message, **numbers)


# ------------------------------------------------------------------------------------------------------- tables


def show(
    console: Console,
    build: dict[str, str],
    gpus: list[dict[str, str]],
    outcomes: list[Outcome],
    problems: list[str],
) -> None:
    about = Table.grid(padding=(0, 2))
    for name, value in build.items():
        about.add_row(f"[bold]{name}[/]", escape(value))
    for gpu in gpus:
        about.add_row(f"[bold]{gpu.pop('device')}[/]", ", ".join(gpu.values()))
    if not gpus:
        about.add_row("[bold]GPU[/]", "none that torch can use")
    console.print(about)

    dtypes = list(dict.fromkeys(o.dtype for o in outcomes))
    table = Table(
        "operator", "device", *dtypes, title="What runs where, and its error beside the reference",
        title_justify="left", caption="relative to the largest value; refused and no kernel: such a call raises",
        caption_justify="left",
    )  # fmt: skip
    by_place: dict[tuple[str, str], dict[str, Outcome]] = {}
    for o in outcomes:
        by_place.setdefault((o.operator, o.device), {})[o.dtype] = o
    for (operator, device), cells in by_place.items():
        table.add_row(operator, device, *(cell(cells[dtype]) for dtype in dtypes))
    console.print(table)

    for reason in dict.fromkeys(o.message for o in outcomes if o.status == "refused"):
        console.print(f"refused: {reason}", style="dim", markup=False, highlight=False)
    if not problems:
        console.print("[bold green]Everything is right.[/]")
    for problem in problems:
        console.print(f"problem: {problem}", style="bold red", markup=False, highlight=False)


def cell(o: Outcome) -> str:
    styles = {"right": "green", "refused": "dim", "no kernel": "dim"}
    text = f"{o.error:.1e}" if o.status == "right" else o.status
    return f"[{styles.get(o.status, 'bold red')}]{text}[/]"
