"""End to end: what faster attention buys in whole models, with random weights.

Diffusion transformers at the shapes of HunyuanVideo, Cosmos and FLUX: a stack of blocks with dense attention (SDPA)
against the same blocks with neighborhood attention; the share of attention in the time, and the speedup of the whole.
Language models of 1.3 billion parameters' shape: layers with DeltaNet against layers with softmax attention
(SDPA), a training step and decoding. SDPA is cuDNN's where it runs, the fastest on Hopper.

    python bench/models.py [--only TEXT] [--blocks N] [--store] [--commit NAME] [--out FOLDER]

Times are per block or layer, because all of a model's are alike. Without a GPU everything runs scaled down, in float32,
and says so: that only shows that the bench works.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from nearfield import neighborhood_attention
from nearfield._files import folder
from nearfield.bench import report
from nearfield.nn import DeltaNet, SlidingWindowAttention, SwiGLU
from timing import header, run, save, time_ms
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

TITLE = "Whole models, milliseconds per block or layer"
FASTEST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


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
        return dense(q, k, v, is_causal=True)


def dense(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
    tokens = (t.flatten(1, -3).transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel(FASTEST, set_priority=True):
        o = F.scaled_dot_product_attention(*tokens, is_causal=is_causal)
    return o.transpose(1, 2).reshape(v.shape)


Row = dict[str, Any]  # bench/README.md describes the keys


@dataclass
class Bench:
    """Where and how the models run."""

    device: torch.device
    dtype: torch.dtype
    blocks: int

    def time(self, run: Callable[[], object]) -> float:
        """Milliseconds per block."""
        return time_ms(run, device=self.device) / self.blocks

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def place(self) -> AbstractContextManager[Any]:
        """Parameters are drawn where they stay: the host would take longer than everything that is timed."""
        torch.manual_seed(0)
        return self.device

    def transformer(self, case: Transformer, dense_row: Row) -> Row:
        """Forward only, as in sampling. ``dense_row`` keeps what does not depend on the window."""

        def near(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            o = neighborhood_attention(q, k, v, case.window, stride=case.stride)
            assert isinstance(o, Tensor)
            return o

        x = self.random(1, *case.size, case.heads * case.dim)
        q, k, v = self.random(3, 1, *case.size, case.heads, case.dim)

        def timed(attend: Callable[[Tensor, Tensor, Tensor], Tensor], prefix: str) -> Row:
            with self.place():
                stack = nn.Sequential(*(Block(case, attend) for _ in range(self.blocks))).to(self.dtype)
            ms = self.time(lambda: stack(x))
            attention = self.blocks * self.time(lambda: attend(q, k, v))
            return {f"{prefix}fwd_ms": ms, f"{prefix}attention_share": min(1.0, attention / ms)}

        with torch.no_grad():
            if not dense_row:
                dense_row |= timed(dense, "sdpa_")
            row = {"case": case.name, "tokens": math.prod(case.size), **timed(near, ""), **dense_row}
        return row | {"speedup": row["sdpa_fwd_ms"] / row["fwd_ms"]}

    def language_model(self, case: LanguageModel) -> list[Row]:
        """A training step (forward and backward), and one decoded token after ``tokens`` others."""
        mixers: dict[str, Callable[[], nn.Module]] = {
            "sdpa_": lambda: SoftmaxAttention(case.width, case.heads, case.tokens + 1),
            "": lambda: DeltaNet(case.width, case.heads),
        }
        train: Row = {"case": f"{case.name}, training step", "tokens": case.tokens}
        decode: Row = {"case": f"{case.name}, next token", "tokens": case.tokens}
        for prefix, mixer in mixers.items():
            with self.place():
                stack = nn.ModuleList(Layer(case.width, mixer()) for _ in range(self.blocks)).to(self.dtype)
            x = self.random(case.batch, case.tokens, case.width).requires_grad_()
            leaves = [x, *stack.parameters()]

            def step(stack: nn.ModuleList = stack, x: Tensor = x, leaves: list[Tensor] = leaves) -> object:
                y = x
                for layer in stack:
                    y = layer(y)
                return torch.autograd.grad(y.float().square().mean(), leaves)

            train[f"{prefix}fwdbwd_ms"] = self.time(step)
            with torch.no_grad():
                caches = [layer.mixer.new_cache(case.batch) for layer in stack]  # type: ignore[operator, union-attr]
                y = x
                for layer, cache in zip(stack, caches, strict=True):
                    y = layer(y, cache)

                def one(
                    stack: nn.ModuleList = stack, caches: list[Any] = caches, token: Tensor = x[:, -1:]
                ) -> None:
                    for layer, cache in zip(stack, caches, strict=True):
                        token = layer(token, cache)

                decode[f"{prefix}fwd_ms"] = self.time(one)
            del stack, caches, leaves
        train["speedup"] = train["sdpa_fwdbwd_ms"] / train["fwdbwd_ms"]
        decode["speedup"] = decode["sdpa_fwd_ms"] / decode["fwd_ms"]
        return [train, decode]


def main(
    only: Annotated[str, typer.Option(help="Only models whose names contain this.")] = "",
    blocks: Annotated[int, typer.Option(min=1, help="Blocks or layers in a stack.")] = 2,
    store: Annotated[bool, typer.Option(help="Write bench/results/<gpu>-models.json.")] = False,
    commit: Annotated[str, typer.Option(help="Where the code was carried without its repository.")] = "",
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results: JSON, Markdown and a plot.")
    ] = None,
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    transformers = [c for c in TRANSFORMERS if only.lower() in c.name.lower()]
    language_models = [c for c in LANGUAGE_MODELS if only.lower() in c.name.lower()]
    if not transformers and not language_models:
        raise typer.BadParameter(f"no model's name contains {only!r}; there are: "
                                 + ", ".join(c.name for c in (*TRANSFORMERS, *LANGUAGE_MODELS)))  # fmt: skip
    if store and not on_gpu:
        raise typer.BadParameter("--store is for runs on a GPU; scaled-down times are no results")
    if out is not None and out.exists() and not out.is_dir():
        raise typer.BadParameter(f"out is {out}, which is a file; a folder is expected")
    if not on_gpu:
        transformers = [c.scaled_down() for c in transformers]
        language_models = [c.scaled_down() for c in language_models]
        print("No GPU: SCALED DOWN, float32 on the CPU. These times say nothing about the models.")
    bench = Bench(device, torch.bfloat16 if on_gpu else torch.float32, blocks)
    rows: list[Row] = []
    dense_rows: dict[object, Row] = {}
    for case in transformers:
        same_dense = case.size, case.heads, case.dim, case.mlp
        rows.append(bench.transformer(case, dense_rows.setdefault(same_dense, {})))
        tell(rows[-1:])
    for model in language_models:
        rows += bench.language_model(model)
        tell(rows[-2:])
    facts: dict[str, Any] = {"title": TITLE, "blocks": blocks} | ({} if on_gpu else {"scaled_down": True})
    facts |= {"commit": commit} if commit else {}
    if store:
        print(save("models", rows, **facts))
    if out is not None:
        with folder(out):
            path = save("models", rows, into=out, device=device, **facts)
            report.write_beside(path, TITLE)
            print(f"{path}, with .md and .png beside it")
    print(report.markdown({"group": "models", **header(device), **facts, "rows": rows}))


def tell(rows: list[Row]) -> None:
    """What is done so far."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    for row in rows:
        shares = [f"{row[key]:.0%}" for key in ("sdpa_attention_share", "attention_share") if key in row]
        share = f", attention {' -> '.join(shares)} of the time" if shares else ""
        print(f"{row['case']}: {row['speedup']:.2f}x{share}", flush=True)


if __name__ == "__main__":
    run(main)
