"""One timer for every bench: cold caches, median of many; and the header that lets a number be found again."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import nearfield
from nearfield._files import write_atomically

HOST_HEAD_START = 1_500_000  # GPU cycles, just under a millisecond: longer than the host needs for any call


def time_ms(
    run: Callable[[], Any], budget_ms: float = 300.0, most: int = 50, device: torch.device | str = "cuda"
) -> float:
    """Median milliseconds of the work in ``run``; on a GPU each time after the L2 cache was overwritten."""
    if torch.device(device).type == "cpu":
        return _cpu_ms(run, budget_ms, most)
    return _gpu_ms(run, budget_ms, most)


def _gpu_ms(run: Callable[[], Any], budget_ms: float, most: int) -> float:
    """The GPU is kept busy while the host queues the work, so that what the host needs for a call (``host_us``) is no
    part of the time: otherwise a short kernel behind a slow launch is timed with the gap before it.
    """
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")  # five times the L2 of a Hopper GPU
    for _ in range(2):
        run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    repeats = _repeats(start.elapsed_time(end), budget_ms, most)
    times: list[float] = []
    for _ in range(repeats):
        flush.zero_()
        torch.cuda._sleep(HOST_HEAD_START)  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def _cpu_ms(run: Callable[[], Any], budget_ms: float, most: int) -> float:
    def once() -> float:
        begin = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - begin)

    once()
    return statistics.median(once() for _ in range(_repeats(once(), budget_ms, most)))


def _repeats(once_ms: float, budget_ms: float, most: int) -> int:
    return int(max(3, min(most, budget_ms / max(once_ms, 1e-3))))


def host_us(run: Callable[[], Any], repeats: int = 10) -> float:
    """Median microseconds until ``run`` returns to the caller, while the GPU has other work."""
    run()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        torch.cuda._sleep(HOST_HEAD_START)  # type: ignore[no-untyped-call]
        begin = time.perf_counter()
        run()
        times.append(1e6 * (time.perf_counter() - begin))
    torch.cuda.synchronize()
    return statistics.median(times)


def header(device: torch.device | str = "cuda") -> dict[str, Any]:
    """Machine, versions, commit and clocks of this run."""
    head: dict[str, Any] = {"nearfield": nearfield.__version__, "torch": torch.__version__}
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    if torch.device(device).type == "cpu":
        head |= {"cpu": platform.machine(), "threads": torch.get_num_threads()}
    else:
        query = "clocks.sm,clocks.mem,power.limit,driver_version"
        smi = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        head |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, query: _say(smi)}
    return {**head, "commit": _say(git)}


def _say(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def result_path(folder: Path, name: str, head: dict[str, Any]) -> Path:
    """``<gpu>-<name>.json``, or ``cpu-<name>.json``."""
    machine = head.get("gpu", "cpu").lower().replace("nvidia ", "").replace(" ", "-")
    return folder / f"{machine}-{name}.json"


def save(folder: Path, name: str, head: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Writes the results of one group; bench/README.md describes the file."""
    path = result_path(folder, name, head)
    write_atomically(path, json.dumps({"group": name, **head, "rows": rows}, indent=1) + "\n")
    return path
