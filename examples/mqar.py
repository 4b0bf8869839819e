"""Multi-query associative recall as in Zoology (arXiv 2312.04927): who can look up a value by its key?

A sequence tells pairs of key and value and later repeats the keys, at random places among filler tokens, most of them
soon. After each repeated key the model has to name its value. Keys, values and fillers come from a vocabulary of 8192,
so nothing can be learned about single tokens: the model must move symbols. Models are two layers that differ in the
mixer over time; embedding and output layer share their weights, and only places with a question count.

    python examples/mqar.py                      # the recorded small run: 15 minutes on one CPU core
    python examples/mqar.py --dim 128 --steps 5000 --case 512:64 --device cuda
"""

from __future__ import annotations

import json
import statistics
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

VOCABULARY = 8192
POWER = 0.01
"""The chance of a gap g between a pair and its question falls with g^(POWER - 1)."""


def sample(batch: int, length: int, pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens ``[batch, length]``, places of the questions ``[batch, pairs]`` and their answers ``[batch, pairs]``."""
    half = VOCABULARY // 2
    keys = 1 + torch.rand(batch, half - 1, generator=generator).topk(pairs).indices  # without repetition
    values = torch.randint(half, VOCABULARY, (batch, pairs), generator=generator)
    places = (length - 2 * pairs) // 2  # a question takes two tokens: the key, and its answer
    weight = torch.arange(1, places + 1).float() ** (POWER - 1)
    gaps = torch.multinomial(weight.expand(batch, -1), pairs, generator=generator)
    tokens = torch.randint(VOCABULARY, (batch, length), generator=generator)
    tokens[:, : 2 * pairs] = torch.stack([keys, values], 2).flatten(1)
    asked = 2 * pairs + 2 * gaps
    tokens.scatter_(1, asked, keys)
    tokens.scatter_(1, asked + 1, values)
    return tokens, asked, values


class Model(nn.Module):
    def __init__(self, mixer: str, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, dim)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.stack = Stack(mixer, dim, layers=2)

    def forward(self, tokens: Tensor, asked: Tensor) -> Tensor:
        """Logits ``[batch, questions, VOCABULARY]``."""
        x = self.stack(self.embedding(tokens))
        x = x.gather(1, asked[..., None].expand(-1, -1, x.shape[-1]))
        return F.linear(x, self.embedding.weight)


def train(
    mixer: str,
    length: int,
    pairs: int,
    dim: int,
    steps: int,
    batch: int,
    rate: float,
    device: str,
    seed: int = 0,
) -> tuple[float, float, int]:
    """Accuracy on unseen sequences, seconds, and the number of parameters besides the embedding."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Model(mixer, dim).to(device)
    trainer = Trainer(model, steps, rate)
    started = time.perf_counter()
    for _ in range(steps):
        tokens, asked, answers = (t.to(device) for t in sample(batch, length, pairs, generator))
        trainer.step(F.cross_entropy(model(tokens, asked).flatten(0, 1), answers.flatten()))
    seconds = time.perf_counter() - started
    tokens, asked, answers = (
        t.to(device) for t in sample(256, length, pairs, torch.Generator().manual_seed(10**6))
    )
    with torch.no_grad():
        right = torch.cat(
            [model(t, a).argmax(-1) for t, a in zip(tokens.split(32), asked.split(32), strict=True)]
        )
    accuracy = float((right == answers).float().mean())
    return accuracy, seconds, sum(p.numel() for p in model.stack.parameters())


def parse(case: str) -> tuple[int, int]:
    """``length:pairs``."""
    try:
        length, pairs = (int(part) for part in case.split(":"))
    except ValueError:
        raise typer.BadParameter(f"{case!r} is no case; expected length:pairs, for example 64:8") from None
    if pairs < 1 or length < 4 * pairs:
        raise typer.BadParameter(f"{case}: a sequence needs at least 4 tokens per pair, and one pair")
    return length, pairs


def main(
    mixer: Annotated[list[str] | None, typer.Option(help="Mixers; all by default.")] = None,
    case: Annotated[list[str] | None, typer.Option(help="length:pairs, as often as you like.")] = None,
    dim: int = 64,
    steps: int = 800,
    batch: int = 32,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-2,
    device: str = "cpu",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each model and case, with seeds 0, 1, ..")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Write the results there as JSON.", callback=destination)
    ] = None,
) -> None:
    """Trains every mixer on every case and prints the accuracy on unseen sequences."""
    mixers, cases = mixer or list(MIXERS), case or ["64:4", "64:16", "128:16"]
    unknown = [name for name in mixers if name not in MIXERS]
    if unknown:
        raise typer.BadParameter(f"mixer is {unknown[0]!r}; choose from {', '.join(MIXERS)}")
    parsed = [parse(c) for c in cases]
    rows = []
    with Progress() as progress:
        task = progress.add_task("training", total=len(mixers) * len(cases) * seeds)
        for name in mixers:
            for length, pairs in parsed:
                accuracies, spent, parameters = [], 0.0, 0
                for seed in range(seeds):
                    what = f"{name} on {pairs} pairs in {length} tokens, seed {seed}"
                    progress.update(task, description=what)
                    accuracy, seconds, parameters = train(
                        name, length, pairs, dim, steps, batch, rate, device, seed
                    )
                    accuracies.append(round(accuracy, 4))
                    spent += seconds
                    progress.advance(task)
                rows.append(
                    {"mixer": name, "length": length, "pairs": pairs, "accuracy": round(statistics.mean(accuracies), 4),
                     "accuracies": accuracies, "seconds": round(spent, 1), "parameters": parameters}
                )  # fmt: skip
    table = Table("mixer", *cases, "parameters", title="accuracy by seed, length:pairs")
    for name in mixers:
        mine = [row for row in rows if row["mixer"] == name]
        cells = (" ".join(f"{accuracy:.1%}" for accuracy in row["accuracies"]) for row in mine)
        table.add_row(name, *cells, str(mine[0]["parameters"]))
    Console().print(table)
    if out is not None:
        settings = {
            "task": "mqar", "vocabulary": VOCABULARY, "window": WINDOW, "layers": 2, "dim": dim, "steps": steps,
            "batch": batch, "rate": rate, "device": device, "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }  # fmt: skip
        out.write_text(json.dumps({**settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
