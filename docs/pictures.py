"""The pictures of the pages, drawn by calling the operators."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from nearfield import delta_rule, local_linear_attention, neighborhood_attention
from nearfield.cli.picture import draw_window
from nearfield.cli.simulate import Counter, Problem

BLUE, GREEN, GREY = "#2f6fb2", "#0b6e4f", "#8a8a8a"
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
PICTURES: dict[str, Callable[[], bytes]] = {}


def picture(draw: Callable[[], Figure | bytes]) -> Callable[[], Figure | bytes]:
    def png() -> bytes:
        with mpl.rc_context(STYLE):
            drawn = draw()
            if isinstance(drawn, bytes):
                return drawn
            out = io.BytesIO()
            drawn.savefig(out, format="png", dpi=130)
        return out.getvalue()

    PICTURES[draw.__name__.replace("_", "-")] = png
    return draw


def heat(panel: Any, weights: torch.Tensor, title: str) -> None:
    bound = float(weights.abs().max())
    panel.imshow(weights.numpy(), cmap="RdBu", vmin=-bound, vmax=bound)
    panel.set_title(title, loc="left", fontsize=9)
    panel.set_xlabel("value written at")


@picture
def gna_weights() -> Figure:
    """With unit vectors as values the output is the weights themselves."""
    height, width = 15, 20
    tokens = height * width
    torch.manual_seed(1)
    q, k = 0.6 * torch.randn(2, 1, height, width, 1, 8)
    values = torch.eye(tokens).reshape(1, height, width, 1, tokens)
    options = [
        ("window 7", {"kernel_size": 7}),
        ("window 7, stride 4", {"kernel_size": 7, "stride": 4}),
        ("window 5, dilation 3", {"kernel_size": 5, "dilation": 3}),
        ("window 7, causal downwards", {"kernel_size": 7, "is_causal": (True, False)}),
    ]
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    for panel, (title, given) in zip(figure.subplots(1, 4), options, strict=True):
        out = neighborhood_attention(q, k, values, **given)  # type: ignore[arg-type]
        assert isinstance(out, torch.Tensor)
        shown = torch.full((height, width), float("nan"))
        for at, mark in (((10, 14), "o"), ((1, 2), "s")):
            weights = out[0, at[0], at[1], 0].reshape(height, width)
            shown = torch.where(weights > 0, weights, shown)
            panel.plot(at[1], at[0], mark, color="white", markeredgecolor="black", markersize=5)
        panel.set_facecolor("#eeeeee")
        panel.imshow(shown.numpy(), cmap="viridis")
        panel.set_title(title, loc="left", fontsize=9)
        panel.set_xticks([])
        panel.set_yticks([])
    return figure


@picture
def gna_tiles() -> bytes:
    problem = Problem((32, 40), (13, 15), (1, 1), (1, 1), (False, False))
    tiling = Counter(128)(problem, (4, 4), (4, 4))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiles.png"
        draw_window(problem, tiling, "span", (14, 17), path)
        return path.read_bytes()


@picture
def delta_weights() -> Figure:
    """Six keys, each written four times: what a read gives back of every write."""
    keys, times = 6, 4
    tokens = keys * times
    k = torch.eye(keys).repeat(times, 1)[None, :, None]  # [1, T, 1, K]
    values = torch.eye(tokens)[None, :, None]
    half, full = torch.full((1, tokens, 1), 0.5), torch.ones(1, tokens, 1)
    forget = torch.full((1, tokens, 1), -0.08)
    shown = [
        ("DeltaNet, beta 1: overwritten", (full, None)),
        ("DeltaNet, beta 1/2: half corrected", (half, None)),
        ("Gated DeltaNet: and forgotten", (half, forget)),
    ]
    figure = Figure(figsize=(11, 3.1), layout="constrained")
    panels = figure.subplots(1, 4)
    heat(panels[0], (k[0, :, 0] @ k[0, :, 0].T).tril(), "linear attention: only added")
    for panel, (title, (beta, g)) in zip(panels[1:], shown, strict=True):
        out, _ = delta_rule(k, k, values, beta, g, scale=1.0)
        heat(panel, out[0, :, 0], title)
    figure.axes[0].set_ylabel("read at")
    return figure


@picture
def lla_fit() -> Figure:
    """A noisy curve over an arc of keys of length 1, read everywhere by both kinds of attention."""
    torch.manual_seed(2)
    angle = torch.linspace(-0.8, 0.8, 80, dtype=torch.float64)
    values = 1.6 * angle + 0.25 * torch.cos(5 * angle) + 0.06 * torch.randn(80, dtype=torch.float64)
    keys = torch.stack([angle.sin(), angle.cos()], -1)[None, :, None]
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    panel = figure.subplots()
    panel.plot(angle, values, ".", color=GREY, label="values, over the angle of their keys")
    for lam, color, label in ((1e6, BLUE, "softmax attention"), (1e-4, GREEN, "local linear attention")):
        out = local_linear_attention(
            keys,
            keys,
            values[None, :, None, None],
            lam=lam,
            scale=25.0,
            is_causal=False,
            tol=1e-9,
            max_iters=100,
        )
        panel.plot(angle, out[0, :, 0, 0], color=color, label=label)
    panel.legend(frameon=False)
    panel.set_xlabel("angle of the query")
    return figure
