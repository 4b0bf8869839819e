"""One timer for every bench: CUDA events, cold L2, median of many; and the header that lets a number be found again."""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
HOST_HEAD_START = 1_500_000  # GPU cycles, just under a millisecond: longer than the host needs for any call


def time_ms(run: Callable[[], Any], budget_ms: float = 300.0, most: int = 50) -> float:
    """Median milliseconds of the GPU's work in ``run``, each time after the L2 cache was overwritten.

    The GPU is kept busy while the host queues the work, so that what the host needs for a call (``host_us``) is no part
    of the time: otherwise a short kernel behind a slow launch is timed with the gap before it.
    """
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")  # five times the L2 of a Hopper GPU
    for _ in range(2):
        run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    repeats = int(max(3, min(most, budget_ms / max(start.elapsed_time(end), 1e-3))))
    times = []
    for _ in range(repeats):
        flush.zero_()
        torch.cuda._sleep(HOST_HEAD_START)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def host_us(run: Callable[[], Any], repeats: int = 50) -> float:
    """Median microseconds until ``run`` returns to the caller, while the GPU has other work."""
    run()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        torch.cuda._sleep(HOST_HEAD_START)
        begin = time.perf_counter()
        run()
        times.append(1e6 * (time.perf_counter() - begin))
    torch.cuda.synchronize()
    return statistics.median(times)


def header() -> dict[str, Any]:
    """Machine, versions, commit and clocks of this run."""
    query = "clocks.sm,clocks.mem,power.limit,driver_version"
    smi = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]

    def say(command: list[str]) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        query: say(smi),
        "commit": say(git),
    }


def save(name: str, rows: list[dict[str, Any]], commit: str | None = None) -> Path:
    """Writes ``results/<gpu>-<name>.json``."""
    head = header()
    if commit:
        head["commit"] = commit
    gpu = head["gpu"].lower().replace("nvidia ", "").replace(" ", "-")
    path = RESULTS / f"{gpu}-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    return path
