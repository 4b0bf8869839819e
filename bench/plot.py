"""Draws the speedups over dense cuDNN attention from a results file, with the bound that arithmetic sets.

python bench/plot.py bench/results/<gpu>-gna.json
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl
import typer

mpl.use("Agg")
import matplotlib.pyplot as plt


def main(results: Path) -> None:
    data = json.loads(results.read_text())
    rows = [row for row in data["rows"] if "cudnn_fwd_ms" in row]
    passes = [name for name in ("fwd", "bwd") if all(f"{name}_speedup" in row for row in rows)]
    figure, axes = plt.subplots(
        1, len(passes), figsize=(6.5 * len(passes), 0.38 * len(rows) + 1.4), sharey=True
    )
    for axis, name in zip([axes] if len(passes) == 1 else axes, passes, strict=True):
        at = range(len(rows))
        axis.barh(at, [row["flop_bound"] for row in rows], color="#e4e7eb", label="bound by arithmetic")
        speedups = [row[f"{name}_speedup"] for row in rows]
        axis.barh(at, speedups, height=0.5, color="#2f6fb2", label="nearfield")
        for y, speedup in zip(at, speedups, strict=True):
            axis.text(speedup, y, f" {speedup:.1f}x", va="center", fontsize=8)
        axis.axvline(1, color="#444444", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_title({"fwd": "forward", "bwd": "backward"}[name], loc="left")
        axis.set_xlabel("times faster than dense cuDNN attention of the same shape")
        axis.spines[["top", "right"]].set_visible(False)
    first = figure.axes[0]
    first.set_yticks(range(len(rows)), [row["case"] for row in rows])
    first.invert_yaxis()
    first.legend(loc="lower right", frameon=False, fontsize=8)
    figure.suptitle(
        f"Neighborhood attention, bfloat16, {data['gpu']}, commit {data['commit']}", x=0.01, ha="left"
    )
    figure.tight_layout()
    figure.savefig(results.with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    typer.run(main)
