"""Runs a group: checks first, then one row per case with the times of every contender."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from nearfield import _runtime
from nearfield._accuracy import worst
from nearfield.bench.case import OURS, Case, Contender, Group, Pass
from nearfield.bench.ceiling import Ceiling
from nearfield.bench.timing import host_us, time_ms

Row = dict[str, Any]
BUDGET_MS = {"cuda": 300.0, "cpu": 60.0}  # of one contender and pass


@dataclass
class Results:
    """Of one group."""

    rows: list[Row] = field(default_factory=list)
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)  # by kind: error, allowed, part
    refusals: dict[str, str] = field(default_factory=dict)  # kinds without a kernel here, and why
    failures: list[str] = field(default_factory=list)
    peers: dict[Hashable, Row] = field(
        default_factory=dict
    )  # what was timed of contenders that do the same work again


def select(group: Group, device: torch.device, only: str) -> list[Case]:
    cases = group.small if device.type == "cpu" else group.cases
    return [case for case in cases if only.lower() in case.name.lower()]


def run_group(
    group: Group,
    device: torch.device,
    ceiling: Ceiling,
    *,
    only: str = "",
    passes: tuple[Pass, ...] | None = None,
    peers: bool = True,
    report: Callable[[str], None] = lambda _: None,
    keep: Callable[[Results], None] = lambda _: None,
) -> Results:
    """``report`` is told what comes next, once per check and once per case; ``keep`` gets what there is after each case."""
    dtype = torch.float32 if device.type == "cpu" else group.dtype
    results = Results()
    cases = select(group, device, only)
    for kind, case in reversed({case.kind: case for case in reversed(cases)}.items()):
        report(f"{kind}: check against the reference")
        torch.manual_seed(0)
        try:
            part, accuracy = worst(case.check(device, dtype))
        except RuntimeError as error:
            _blame(results, kind, error)
            continue
        finally:
            _free(device)
        numbers = {"error": accuracy.error, "allowed": accuracy.allowed}
        if accuracy.ok:
            results.checks[kind] = {"case": case.name, "part": part, **numbers}
        else:
            off = f"{part} is off by {accuracy.error:.2g}, allowed is {accuracy.allowed:.2g}"
            results.failures.append(f"{case.name}: {off}; {kind} is not timed")
    for case in cases:
        report(case.name)
        if case.kind in results.checks:
            row = _row(case, device, dtype, ceiling, passes or group.passes, peers, results)
            if row is not None:
                results.rows.append(row)
                keep(results)
    return results


def _row(
    case: Case, device: torch.device, dtype: torch.dtype, ceiling: Ceiling, passes: tuple[Pass, ...], peers: bool,
    results: Results,
) -> Row | None:  # fmt: skip
    row: Row = {"case": case.name, "dtype": str(dtype).removeprefix("torch."), **case.facts()}
    try:
        for contender in case.contenders(device, dtype):
            if contender.name == OURS:
                _time_ours(row, case, contender, passes, device, ceiling, dtype)
            elif peers:
                key = contender.same and (contender.name, contender.same)
                times = results.peers.get(key) or _time_peer(contender, passes, device)
                if key:
                    results.peers[key] = times
                row |= times
    except RuntimeError as error:
        _blame(results, case.name, error)
        return None
    finally:
        _free(device)
    return row


def _time_ours(
    row: Row, case: Case, contender: Contender, passes: tuple[Pass, ...], device: torch.device, ceiling: Ceiling,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    work = case.work(dtype)
    for name in passes:
        call = prepare(contender, name)
        ms = row[f"{name}_ms"] = time_ms(call, BUDGET_MS[device.type], device=device)
        if name in work:
            row[f"{name}_useful_tflops"] = work[name].flops / ms / 1e9
            if work[name].visited_flops:
                row[f"{name}_visited_tflops"] = work[name].visited_flops / ms / 1e9
        if device.type == "cuda":  # a scaled-down case has no target, and lies in the CPU's caches
            row[f"{name}_host_us"] = host_us(call)
            row[f"{name}_peak_mib"] = _peak_mib(call)
            if name in work:
                row[f"{name}_roofline"] = ceiling.least_ms(work[name]) / ms
            if name in case.targets:
                row[f"{name}_target_ms"] = case.targets[name]


def _peak_mib(call: Callable[[], Any]) -> float:
    """What a call allocates on top of its inputs, results included."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _time_peer(contender: Contender, passes: tuple[Pass, ...], device: torch.device) -> Row:
    row: Row = {}
    for name in passes:
        if name != "fwd" and contender.gradient is None:
            continue  # a forward alone
        try:
            call = prepare(contender, name)
            row[f"{contender.name}_{name}_ms"] = time_ms(call, BUDGET_MS[device.type], device=device)
        except Exception as error:  # whatever a peer raises is a fact about it, not about us
            row[f"{contender.name}_{name}_error"] = _runtime.sentence(error)
    return row


def prepare(contender: Contender, name: Pass) -> Callable[[], Any]:
    """The call to time for a pass."""
    leaves, gradient = list(contender.leaves), contender.gradient
    if name == "fwd":

        @torch.no_grad()
        def forward() -> Any:
            return contender.forward()

        return forward
    if name == "fwdbwd":
        return lambda: torch.autograd.grad(contender.forward(), leaves, gradient)
    out = contender.forward()
    return lambda: torch.autograd.grad(out, leaves, gradient, retain_graph=True)


def _blame(results: Results, what: str, error: RuntimeError) -> None:
    message = _runtime.sentence(error)
    if _runtime.is_refusal(error):
        results.refusals[what] = message
    else:
        results.failures.append(f"{what}: {message}")


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
