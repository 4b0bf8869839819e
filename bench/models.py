"""End to end: what faster attention buys in whole models, with random weights.

Diffusion transformers at the shapes of HunyuanVideo, Cosmos and FLUX: a stack of blocks with dense attention (SDPA)
against the same blocks with neighborhood attention; the share of attention in the time, and the speedup of the whole.
Language models of 1.3 billion parameters' shape: layers with DeltaNet against layers with softmax attention
(SDPA), a training step and decoding.

    python bench/models.py [--only TEXT] [--blocks N] [--store]

Times are per block or layer, because all of a model's are alike. Without a GPU everything runs scaled down, in float32,
and says so: that only shows that the bench works.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from nearfield import neighborhood_attention
from nearfield.nn import DeltaNet, SlidingWindowAttention, SwiGLU
from rich.console import Console
from rich.table import Table
from timing import header, save, time_ms
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Transformer:
    """A diffusion transformer: its grid of tokens, and the window that replaces full attention."""

    name: str
    size: tuple[int, ...]
    heads: int
    dim: int
    """Channels per head."""
    window: tuple[int, ...]
    stride: tuple[int, ...]
    mlp: int = 4
    """Hidden channels of the MLP over channels of the model."""

    def scaled_down(self) -> Transformer:
        """Every length by 8 or so, for a run on a CPU."""
        shrink = [max(4, x // 8) for x in self.size]
        window = tuple(max(2, w * s // x) for w, s, x in zip(self.window, shrink, self.size, strict=True))
        stride = tuple(min(s, w) for s, w in zip(self.stride, window, strict=True))
        return replace(self, size=tuple(shrink), heads=2, dim=32, window=window, stride=stride)


@dataclass(frozen=True)
class LanguageModel:
    """Layers of a language model; decoding follows a prompt of ``tokens``."""

    name: str
    tokens: int
    width: int
    heads: int
    batch: int = 1

    def scaled_down(self) -> LanguageModel:
        return replace(self, tokens=min(256, self.tokens // 32), width=64, heads=2)


TRANSFORMERS = [
    Transformer("HunyuanVideo 720p", (30, 48, 80), 24, 128, (18, 24, 24), (16, 8, 8)),
    Transformer("HunyuanVideo 720p, stride 1", (30, 48, 80), 24, 128, (18, 24, 24), (1, 1, 1)),
    Transformer("Cosmos-Predict1 7B", (16, 44, 80), 32, 128, (16, 32, 48), (1, 8, 16)),
    Transformer("FLUX.1 4K", (256, 256), 24, 128, (80, 80), (16, 16)),
    Transformer("FLUX.1 4K, stride 1", (256, 256), 24, 128, (80, 80), (1, 1)),
]
LANGUAGE_MODELS = [
    LanguageModel("1.3B, 8k tokens", 8192, 2048, 16),
    LanguageModel("1.3B, 32k tokens", 32768, 2048, 16),
]


class Block(nn.Module):
    """Attention and MLP as in a DiT: modulated norms, gates, residuals. ``[B, *X, width]`` to the same."""

    def __init__(self, case: Transformer, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        width = case.heads * case.dim
        self.attend, self.dim = attend, case.dim
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.modulation = nn.Parameter(torch.randn(6, width) * 0.02)
        self.q_norm, self.k_norm = nn.RMSNorm(case.dim), nn.RMSNorm(case.dim)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, case.mlp * width), nn.GELU("tanh"), nn.Linear(case.mlp * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation
        q, k, v = self.qkv(self.norms[0](x) * (1 + scale) + shift).unflatten(-1, (3, -1, self.dim)).unbind(-3)
        o = self.attend(self.q_norm(q), self.k_norm(k), v)
        x = x + gate * self.proj(o.flatten(-2))
        return x + gate2 * self.mlp(self.norms[1](x) * (1 + scale2) + shift2)


class Layer(nn.Module):
    """A mixer over time and an MLP, each behind a norm and with a residual."""

    def __init__(self, width: int, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer, self.mlp = mixer, SwiGLU(width, -(-8 * width // 3 // 64) * 64)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        mixed = self.mixer(self.norms[0](x)) if cache is None else self.mixer(self.norms[0](x), cache)
        x = x + mixed
        return x + self.mlp(self.norms[1](x))


class SoftmaxAttention(SlidingWindowAttention):
    """Causal attention to everything, by PyTorch's SDPA."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(*tokens, is_causal=True).transpose(1, 2)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    tokens = (t.flatten(1, -3).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(*tokens).transpose(1, 2).reshape(v.shape)


class Clock:
    """Milliseconds on a GPU by events, with cold caches; on a CPU the median of three, after a first run."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self, run: Callable[[], object]) -> float:
        if self.device == "cuda":
            return time_ms(run)
        times = []
        run()
        for _ in range(3):
            started = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - started))
        return statistics.median(times)


def bench_transformer(case: Transformer, blocks: int, clock: Clock, dtype: torch.dtype) -> dict[str, object]:
    """Times per block, forward only, as in sampling."""

    def near(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = neighborhood_attention(q, k, v, case.window, stride=case.stride)
        assert isinstance(o, Tensor)
        return o

    torch.manual_seed(0)
    width = case.heads * case.dim
    x = torch.randn(1, *case.size, width, device=clock.device, dtype=dtype)
    q, k, v = torch.randn(3, 1, *case.size, case.heads, case.dim, device=clock.device, dtype=dtype)
    row: dict[str, object] = {"model": case.name, "tokens": math.prod(case.size)}
    whole: dict[str, float] = {}
    with torch.no_grad():
        for kind, attend in (("dense", dense), ("near", near)):
            stack = nn.Sequential(*(Block(case, attend) for _ in range(blocks))).to(clock.device, dtype)
            whole[kind] = clock(lambda stack=stack: stack(x)) / blocks  # type: ignore[misc]
            attention = clock(lambda attend=attend: attend(q, k, v))  # type: ignore[misc]
            row |= {f"{kind} ms": whole[kind], f"{kind} attention share": min(1.0, attention / whole[kind])}
            del stack
    row["speedup"] = whole["dense"] / whole["near"]
    return row


def bench_language_model(
    case: LanguageModel, layers: int, clock: Clock, dtype: torch.dtype
) -> dict[str, object]:
    """Times per layer of a training step (forward and backward) and of one decoded token after ``tokens`` others."""
    mixers: dict[str, Callable[[], nn.Module]] = {
        "softmax": lambda: SoftmaxAttention(case.width, case.heads, case.tokens + 1),
        "deltanet": lambda: DeltaNet(case.width, case.heads),
    }
    row: dict[str, object] = {"model": case.name, "tokens": case.tokens}
    times: dict[tuple[str, str], float] = {}
    for kind, mixer in mixers.items():
        torch.manual_seed(0)
        stack = nn.ModuleList(Layer(case.width, mixer()) for _ in range(layers)).to(clock.device, dtype)
        x = torch.randn(
            case.batch, case.tokens, case.width, device=clock.device, dtype=dtype, requires_grad=True
        )

        def step(stack: nn.ModuleList = stack, x: Tensor = x) -> None:
            y = x
            for layer in stack:
                y = layer(y)
            torch.autograd.backward(y.float().square().mean())
            stack.zero_grad()
            x.grad = None

        times[kind, "train"] = clock(step) / layers
        with torch.no_grad():
            caches = [layer.mixer.new_cache(case.batch) for layer in stack]  # type: ignore[operator, union-attr]
            y = x
            for layer, cache in zip(stack, caches, strict=True):
                y = layer(y, cache)

            def decode(
                stack: nn.ModuleList = stack, caches: list[Any] = caches, token: Tensor = x[:, -1:]
            ) -> None:
                for layer, cache in zip(stack, caches, strict=True):
                    token = layer(token, cache)

            times[kind, "decode"] = clock(decode) / layers
        row |= {f"{kind} {what} ms": times[kind, what] for what in ("train", "decode")}
        del stack, caches
    for what in ("train", "decode"):
        row[f"{what} speedup"] = times["softmax", what] / times["deltanet", what]
    return row


def show(title: str, rows: list[dict[str, object]]) -> None:
    if not rows:
        return
    table = Table(*rows[0], title=title)
    for row in rows:
        cells = []
        for column, value in row.items():
            if not isinstance(value, float):
                cells.append(str(value))
            elif column.endswith("share"):
                cells.append(f"{value:.0%}")
            else:
                cells.append(f"{value:.2f}x" if column.endswith("speedup") else f"{value:.3f}")
        table.add_row(*cells)
    Console(width=160).print(table)


def main(
    only: Annotated[str, typer.Option(help="Only models whose names contain this.")] = "",
    blocks: Annotated[int, typer.Option(min=1, help="Blocks or layers in a stack.")] = 2,
    store: Annotated[bool, typer.Option(help="Write bench/results/<gpu>-models.json.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the rows there as JSON.")] = None,
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    transformers = [c for c in TRANSFORMERS if only in c.name]
    language_models = [c for c in LANGUAGE_MODELS if only in c.name]
    if not transformers and not language_models:
        raise typer.BadParameter(f"no model's name contains {only!r}; there are: "
                                 + ", ".join(c.name for c in (*TRANSFORMERS, *LANGUAGE_MODELS)))  # fmt: skip
    if store and device == "cpu":
        raise typer.BadParameter("--store is for runs on a GPU; scaled-down times are no results")
    if device == "cuda":
        print(header())
    else:
        transformers = [c.scaled_down() for c in transformers]
        language_models = [c.scaled_down() for c in language_models]
        print("No GPU: SCALED DOWN, float32 on the CPU. These times say nothing about the models.")
    clock, dtype = Clock(device), torch.bfloat16 if device == "cuda" else torch.float32
    rows: list[dict[str, object]] = []
    for case in transformers:
        rows.append(bench_transformer(case, blocks, clock, dtype))
        if device == "cuda":
            torch.cuda.empty_cache()
    show("Diffusion transformers, milliseconds per block, forward", rows)
    lm_rows: list[dict[str, object]] = []
    for model in language_models:
        lm_rows.append(bench_language_model(model, blocks, clock, dtype))
        if device == "cuda":
            torch.cuda.empty_cache()
    show("Language models, milliseconds per layer", lm_rows)
    if store:
        print(save("models", [*rows, *lm_rows]))
    if out is not None:
        out.write_text(
            json.dumps(
                {"device": device, "scaled_down": device == "cpu", "rows": [*rows, *lm_rows]}, indent=1
            )
            + "\n"
        )


if __name__ == "__main__":
    typer.run(main)
