"""Multi-query associative recall: read pairs of key and value, then answer each key with its value.

Two models that differ in one line, the mixer over time: the delta rule, whose memory has a fixed size, or softmax
attention, which keeps all tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

from nearfield import delta_rule
from nearfield.demo.places import CPU, Place, choose, wait
from nearfield.demo.report import ACCENT, GREY, Result, Row, save_figure, styled_figure

PAIRS, SYMBOLS, DIM, BATCH, STEPS, EVERY = 16, 64, 64, 32, 300, 10
LEARNING_RATE = 1e-2

Kind = Literal["delta rule", "softmax"]


def sample(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens [batch, 3 PAIRS]: key value key value ..., then all keys again in another order; answers [batch, PAIRS]."""
    keys = torch.rand(batch, SYMBOLS, generator=generator).argsort(1)[:, :PAIRS]
    values = torch.randint(SYMBOLS, 2 * SYMBOLS, (batch, PAIRS), generator=generator)
    order = torch.rand(batch, PAIRS, generator=generator).argsort(1)
    told = torch.stack([keys, values], 2).flatten(1)
    return torch.cat([told, keys.gather(1, order)], 1), values.gather(1, order)


class Mixer(nn.Module):
    def __init__(self, kind: Kind, place: Place) -> None:
        super().__init__()
        self.kind, self.place = kind, place
        self.qkv = nn.Linear(DIM, 3 * DIM, bias=False)
        # A short causal convolution lets a value be stored under the key just before it.
        self.conv = nn.Conv1d(3 * DIM, 3 * DIM, 4, groups=3 * DIM, padding=3)
        self.beta = nn.Linear(DIM, 1)
        self.norm = nn.RMSNorm(DIM)
        self.out = nn.Linear(DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        mixed = F.silu(self.conv(self.qkv(x).mT)[..., :tokens].mT)
        q, k, v = (part[:, :, None] for part in mixed.chunk(3, -1))  # [B, T, 1, DIM]
        if self.kind == "delta rule":
            q, k, v = (part.to(self.place.dtype) for part in (q, k, v))
            o, _ = delta_rule(q, k, v, self.beta(x).float(), use_qk_l2norm=True, beta_activation="sigmoid")
        else:
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        y: Tensor = self.out(self.norm(o[:, :, 0].float()))
        return y


class Model(nn.Module):
    def __init__(self, kind: Kind, place: Place) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2 * SYMBOLS, DIM)
        self.norm = nn.RMSNorm(DIM)
        self.mixer = Mixer(kind, place)
        self.last_norm = nn.RMSNorm(DIM)

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embedding(tokens)
        x = x + self.mixer(self.norm(x))
        # The embedding is also the output layer: the model only has to move a symbol, not to translate it.
        logits: Tensor = F.linear(self.last_norm(x)[:, -PAIRS:], self.embedding.weight) * DIM**-0.5
        return logits


def train(kind: Kind, place: Place, advance: Callable[[], None]) -> tuple[list[int], list[float], float]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    test_tokens, test_answers = (t.to(place.device) for t in sample(256, torch.Generator().manual_seed(2)))
    model = Model(kind, place).to(place.device)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS, pct_start=0.1)
    steps, accuracies, seconds = [], [], 0.0
    for step in range(1, STEPS + 1):
        started = time.perf_counter()
        tokens, answers = (t.to(place.device) for t in sample(BATCH, generator))
        loss = F.cross_entropy(model(tokens).flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        wait(place)
        seconds += time.perf_counter() - started
        if step % EVERY == 0:
            with torch.no_grad():
                right = model(test_tokens).argmax(-1) == test_answers
            steps.append(step)
            accuracies.append(float(right.float().mean()))
        advance()
    return steps, accuracies, seconds


def attempt(place: Place) -> None:
    x = torch.randn(1, 8, 1, DIM, device=place.device, dtype=place.dtype, requires_grad=True)
    o, _ = delta_rule(x, x, x, x[..., 0].float(), use_qk_l2norm=True, beta_activation="sigmoid")
    torch.autograd.backward(o.sum())


def run(out: Path, progress: Progress, use_gpu: bool) -> Result:
    place = choose(attempt, (torch.float32, torch.bfloat16), use_gpu)
    task = progress.add_task(f"Learning to recall ({place})", total=2 * STEPS)
    figure, ((axis,),) = styled_figure(1, 1, 8, 3.8)
    rows = []
    kinds: tuple[Kind, ...] = ("delta rule", "softmax")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are so small that a second thread costs more than it gives
    for kind in kinds:
        # Softmax attention is PyTorch's own and runs in float32 on the same device.
        where = place if kind == "delta rule" else Place(place.device, CPU.dtype)
        steps, accuracies, seconds = train(kind, where, lambda: progress.advance(task))
        ours = kind == "delta rule"
        method = "DeltaNet, one layer" if ours else "softmax attention, one layer"
        reached = next((s for s, a in zip(steps, accuracies, strict=True) if a >= 0.9), None)
        note = f"{accuracies[-1]:.1%}, 90% after {reached or '> ' + str(STEPS)} steps"
        rows.append(Row(f"recall {PAIRS} pairs", method, note, seconds, str(where), ours=ours))
        label = f"{method}: {accuracies[-1]:.1%}"
        axis.plot(steps, accuracies, color=ACCENT if ours else GREY, linewidth=2.5, label=label)
    torch.set_num_threads(threads)
    axis.set(xlabel="training step", ylabel="accuracy on unseen sequences", ylim=(0, 1.03), xlim=(0, STEPS))
    axis.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    axis.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0), columnspacing=1.6)
    save_figure(figure, out / "recall.png")
    text = (
        f"Sequences tell {PAIRS} pairs out of {SYMBOLS} keys and {SYMBOLS} values and then ask for all of them. Both "
        f"models are one layer of width {DIM} with the same short convolution; only the mixer over time differs. "
        f"{STEPS} steps of {BATCH} sequences; guessing is right in 1 of {SYMBOLS} cases."
    )
    return Result("Learning to recall", text, rows, ["recall.png"])
