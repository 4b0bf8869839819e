"""In-context regression: learn to fit a linear map from pairs, one that may change on the way.

A sequence is x_1 y_1 x_2 y_2 ...: every y is the image of the x before it under a linear map that is drawn anew for each
sequence and, in the drifting task, again in its middle. After every x the model has to predict y. The best that can be
done for a constant map is ridge regression on the pairs so far. Models are equal stacks that differ in the mixer.

    python examples/regression.py            # the recorded small run: 4 minutes on one CPU core
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from models import MIXERS, WINDOW, Stack
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from training import Trainer, destination

INPUTS, OUTPUTS, NOISE = 4, 2, 0.1


def sample(batch: int, pairs: int, drifting: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x ``[batch, pairs, INPUTS]`` and y ``[batch, pairs, OUTPUTS]``, whose variance is about 1."""
    x = torch.randn(batch, pairs, INPUTS, generator=generator)
    maps = torch.randn(batch, 2 if drifting else 1, INPUTS, OUTPUTS, generator=generator) * INPUTS**-0.5
    which = torch.arange(pairs) * maps.shape[1] // pairs
    y = torch.einsum("bpi,bpio->bpo", x, maps[:, which])
    return x, y + NOISE * torch.randn(y.shape, generator=generator)


class Model(nn.Module):
    def __init__(self, mixer: str, dim: int, layers: int) -> None:
        super().__init__()
        self.x, self.y = nn.Linear(INPUTS, dim), nn.Linear(OUTPUTS, dim)
        self.stack = Stack(mixer, dim, layers, heads=2, mlp=True)
        self.answer = nn.Linear(dim, OUTPUTS)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Prediction of every y from what comes before it."""
        tokens = torch.stack([self.x(x), self.y(y)], 2).flatten(1, 2)
        prediction: Tensor = self.answer(self.stack(tokens)[:, ::2])
        return prediction


def ridge(x: Tensor, y: Tensor) -> Tensor:
    """The best prediction for a map that stays: regression on the pairs before, with the true noise and prior."""
    gram = (x[..., :, None] * x[..., None, :]).cumsum(1) + INPUTS * NOISE**2 * torch.eye(INPUTS)
    moment = (x[..., :, None] * y[..., None, :]).cumsum(1)
    maps = torch.linalg.solve(gram, moment)
    return torch.cat([torch.zeros_like(y[:, :1]), torch.einsum("bpi,bpio->bpo", x[:, 1:], maps[:, :-1])], 1)


def late_error(prediction: Tensor, y: Tensor) -> float:
    """Mean squared error over the last quarter of the pairs; the variance of y is about 1."""
    late = y.shape[1] - y.shape[1] // 4
    return F.mse_loss(prediction[:, late:], y[:, late:]).item()


def train(
    mixer: str,
    pairs: int,
    drifting: bool,
    dim: int,
    layers: int,
    steps: int,
    batch: int,
    rate: float,
    device: str,
) -> tuple[float, float]:
    """Late error on unseen sequences, and seconds."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Model(mixer, dim, layers).to(device)
    trainer = Trainer(model, steps, rate)
    started = time.perf_counter()
    for _ in range(steps):
        x, y = (t.to(device) for t in sample(batch, pairs, drifting, generator))
        trainer.step(F.mse_loss(model(x, y), y))
    seconds = time.perf_counter() - started
    x, y = (t.to(device) for t in unseen(pairs, drifting))
    with torch.no_grad():
        return late_error(model(x, y), y), seconds


def unseen(pairs: int, drifting: bool) -> tuple[Tensor, Tensor]:
    return sample(512, pairs, drifting, torch.Generator().manual_seed(10**6))


def main(
    mixer: Annotated[list[str] | None, typer.Option(help="Mixers; all by default.")] = None,
    pairs: Annotated[int, typer.Option(min=4)] = 32,
    dim: int = 64,
    layers: int = 2,
    steps: int = 600,
    batch: int = 32,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 3e-3,
    device: str = "cpu",
    out: Annotated[
        Path | None, typer.Option(help="Write the results there as JSON.", callback=destination)
    ] = None,
) -> None:
    """Trains every mixer on both tasks and prints the error late in unseen sequences, next to ridge regression's."""
    mixers = mixer or list(MIXERS)
    unknown = [name for name in mixers if name not in MIXERS]
    if unknown:
        raise typer.BadParameter(f"mixer is {unknown[0]!r}; choose from {', '.join(MIXERS)}")
    tasks = {"constant": False, "drifting": True}
    rows = [
        {
            "mixer": "ridge regression",
            "task": task,
            "error": round(late_error(ridge(*data), data[1]), 4),
            "seconds": 0.0,
        }
        for task, drifting in tasks.items()
        for data in [unseen(pairs, drifting)]
    ]
    with Progress() as progress:
        bar = progress.add_task("training", total=len(mixers) * len(tasks))
        for name in mixers:
            for task, drifting in tasks.items():
                progress.update(bar, description=f"{name} on a {task} map")
                error, seconds = train(name, pairs, drifting, dim, layers, steps, batch, rate, device)
                rows.append(
                    {"mixer": name, "task": task, "error": round(error, 4), "seconds": round(seconds, 1)}
                )
                progress.advance(bar)
    table = Table(
        "method", *tasks, title=f"squared error in the last quarter of {pairs} pairs; noise {NOISE**2:.2f}"
    )
    for name in ("ridge regression", *mixers):
        table.add_row(name, *(f"{row['error']:.3f}" for row in rows if row["mixer"] == name))
    Console().print(table)
    if out is not None:
        settings = {
            "task": "regression", "pairs": pairs, "window": WINDOW, "layers": layers, "dim": dim, "steps": steps,
            "batch": batch, "rate": rate, "device": device, "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }  # fmt: skip
        out.write_text(json.dumps({**settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
