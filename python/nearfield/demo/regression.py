"""Regression at test time on a world that drifts: nothing is trained, attention itself does the fitting.

Four times in a row the keys come from another cone of the unit sphere and follow another linear map. A query must be
answered with the map of the moment, from the noisy pairs seen so far. Softmax attention averages values and misses
the slope; ridge regression fits a slope, but one for all times; local linear attention fits one around each query.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor

from nearfield import local_linear_attention
from nearfield.demo.places import CPU, Place, choose, wait
from nearfield.demo.report import ACCENT, GREY, Result, Row, save_figure, styled_figure

SEGMENTS, LENGTH, DIM = 4, 256, 32
SPREAD, NOISE = 0.5, 0.05
TUNING, TEST = (
    range(0, 2),
    range(4, 12),
)  # seeds: settings are chosen on the first, errors shown for the second
SCALES, RIDGES, GLOBAL_RIDGES = (8.0, 32.0, 128.0), (1e-3, 1e-4), (1.0, 0.1, 0.01)


class World(NamedTuple):
    """[sequences, tokens, DIM] each."""

    q: Tensor
    k: Tensor
    v: Tensor
    answer: Tensor


def draw(seeds: Iterable[int]) -> World:
    def unit(x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)

    worlds = []
    segment = torch.arange(SEGMENTS).repeat_interleave(LENGTH)
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(*shape, generator=generator)

        centres = unit(normal(SEGMENTS, DIM))[segment]
        k, q = (unit(centres + SPREAD * normal(len(segment), DIM) / math.sqrt(DIM)) for _ in range(2))
        maps = normal(SEGMENTS, DIM, DIM)[segment]
        v, answer = (torch.einsum("td,tde->te", x, maps) for x in (k, q))
        worlds.append(World(q, k, v + NOISE * normal(len(segment), DIM), answer))
    return World(*(torch.stack(parts) for parts in zip(*worlds, strict=True)))


def local_linear(world: World, place: Place, scale: float, lam: float) -> Tensor:
    q, k, v = (x[:, :, None].to(place.device, place.dtype) for x in world[:3])
    return local_linear_attention(q, k, v, lam=lam, scale=scale, max_iters=32)[:, :, 0]


def softmax(world: World, place: Place, scale: float) -> Tensor:
    q, k, v = (x[:, None].to(place.device) for x in world[:3])
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[:, 0]


def global_ridge(world: World, place: Place, lam: float) -> Tensor:
    q, k, v = (x.to(place.device) for x in world[:3])
    eye = torch.eye(DIM, device=place.device)
    answers = []
    for q1, k1, v1 in zip(q, k, v, strict=True):  # one sequence at a time: [tokens, DIM, DIM] is large enough
        gram = (k1[:, :, None] * k1[:, None]).cumsum(0) + lam * eye
        moments = (k1[:, :, None] * v1[:, None]).cumsum(0)
        answers.append(torch.einsum("td,tde->te", torch.linalg.solve(gram, q1), moments))
    return torch.stack(answers)


def errors(world: World, got: Tensor) -> Tensor:
    """[tokens]: squared error over the mean power of the answers, averaged over the sequences."""
    power = world.answer.square().mean((1, 2))
    return ((got.float().cpu() - world.answer).square().mean(2) / power[:, None]).mean(0)


def attempt(place: Place) -> None:
    x = torch.randn(1, 8, 1, DIM, device=place.device, dtype=place.dtype)
    local_linear_attention(x, x, x, lam=1e-4, scale=32.0, max_iters=32)


def run(out: Path, progress: Progress, use_gpu: bool) -> Result:
    place = choose(attempt, (torch.float32, torch.float16), use_gpu)
    plain = Place(place.device, CPU.dtype)
    methods: dict[str, tuple[Callable[..., Tensor], Place, list[tuple[float, ...]]]] = {
        "global ridge regression": (global_ridge, plain, [(lam,) for lam in GLOBAL_RIDGES]),
        "softmax attention": (softmax, plain, [(scale,) for scale in SCALES]),
        "local linear attention": (local_linear, place, list(itertools.product(SCALES, RIDGES))),
    }
    total = sum(len(settings) + 1 for _, _, settings in methods.values())
    task = progress.add_task(f"Following a drifting world ({place})", total=total)
    tuning, test = draw(TUNING), draw(TEST)
    figure, ((axis,),) = styled_figure(1, 1, 8, 3.8)
    rows = []
    colors = {
        "global ridge regression": "#c2c2c2",
        "softmax attention": GREY,
        "local linear attention": ACCENT,
    }
    for name, (method, where, settings) in methods.items():

        def tuning_error(setting: tuple[float, ...], method=method, where=where) -> float:  # type: ignore[no-untyped-def]
            progress.advance(task)
            return float(errors(tuning, method(tuning, where, *setting)).mean())

        best = min(settings, key=tuning_error)
        wait(where)
        started = time.perf_counter()
        answer = method(test, where, *best)
        wait(where)
        seconds = time.perf_counter() - started
        progress.advance(task)
        error = errors(test, answer)
        late = float(error[LENGTH:].mean())  # the first segment has nothing to drift from
        ours = name == "local linear attention"
        rows.append(Row("drifting regression", name, f"{late:.3f} error", seconds, str(where), ours=ours))
        for segment in range(SEGMENTS):  # smoothed inside the segments, so that the changes stay sharp
            part = error[segment * LENGTH : (segment + 1) * LENGTH]
            smooth = F.avg_pool1d(part[None, None], 9, stride=1, padding=4, count_include_pad=False)[0, 0]
            position = segment * LENGTH + torch.arange(LENGTH)
            label = f"{name}: {late:.3f}" if segment == 0 else None
            axis.plot(position, smooth, color=colors[name], linewidth=2.5 if ours else 1.8, label=label)
    for boundary in range(1, SEGMENTS):
        axis.axvline(boundary * LENGTH, color="#dddddd", linewidth=1, zorder=0)
    axis.set(
        xlabel="tokens seen", ylabel="error / power of the answers", xlim=(0, SEGMENTS * LENGTH), yscale="log"
    )
    axis.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), columnspacing=1.6)
    save_figure(figure, out / "regression.png")
    text = (
        f"{SEGMENTS} times {LENGTH} tokens, each segment with its own cone of keys and its own linear map in {DIM} "
        f"dimensions (grey lines: changes). The numbers are means from the first change on. Nothing is trained; bandwidths and ridges are chosen on other sequences. "
        f"Mean over {len(TEST)} sequences."
    )
    return Result("Following a drifting world", text, rows, ["regression.png"])
