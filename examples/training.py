"""What the examples' training loops share."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
import typer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR


def destination(out: Path | None) -> Path | None:
    """Refuses a file that cannot be written, before minutes of training."""
    if out is not None:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise typer.BadParameter(f"{out}: {error.strerror}") from None
        if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
            raise typer.BadParameter(f"{out} cannot be written")
    return out


class Trainer:
    """AdamW whose rate rises over the first tenth of the steps and then falls to zero along a cosine."""

    def __init__(self, model: nn.Module, steps: int, rate: float) -> None:
        rise = max(1, steps // 10)

        def factor(step: int) -> float:
            if step < rise:
                return (step + 1) / rise
            return 0.5 + 0.5 * math.cos(math.pi * (step - rise) / max(1, steps - rise))

        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, rate, weight_decay=0.0)
        self.schedule = LambdaLR(self.optimizer, factor)

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
