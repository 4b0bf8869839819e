"""Results, the look of the figures, and the report: one HTML file that carries its pictures."""

from __future__ import annotations

import base64
import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch

import nearfield
from nearfield._files import write_atomically

matplotlib.use("Agg")  # a fresh machine has no screen
import matplotlib.pyplot as plt

ACCENT = "#0b6e4f"
GREY = "#8a8a8a"


@dataclass(frozen=True)
class Row:
    task: str
    method: str
    quality: str
    seconds: float
    device: str
    ours: bool = False


@dataclass(frozen=True)
class Result:
    title: str
    text: str
    rows: list[Row]
    figures: list[str]


def styled_figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes as an array [rows, columns]."""
    style: Any = {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": GREY,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": "#eeeeee",
    }
    with plt.rc_context(style):
        return plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150)
    plt.close(figure)


STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; max-width: 980px; margin: 48px auto; padding: 0 24px; color: #1c1c1c }
h1 { font-size: 30px; margin-bottom: 4px } h2 { font-size: 21px; margin: 44px 0 6px }
.sub { color: #777; margin-top: 0 } img { max-width: 100%; margin: 10px 0 }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: 6px 12px 6px 0; border-bottom: 1px solid #e8e8e8 } th { color: #777; font-weight: 500 }
td.n, th.n { text-align: right } tr.ours td { color: ACCENT; font-weight: 600 }
""".replace("ACCENT", ACCENT)


def table_html(rows: list[Row]) -> str:
    lines = [
        "<table><tr><th>task</th><th>method</th><th class=n>quality</th><th class=n>seconds</th><th>ran on</th></tr>"
    ]
    for row in rows:
        task, method, quality, device = (
            html.escape(s) for s in (row.task, row.method, row.quality, row.device)
        )
        seconds = f"{row.seconds:.2f}" if row.seconds else ""
        lines.append(
            f"<tr{' class=ours' if row.ours else ''}><td>{task}</td><td>{method}</td><td class=n>{quality}</td>"
            f"<td class=n>{seconds}</td><td>{device}</td></tr>"
        )
    return "\n".join([*lines, "</table>"])


def write_report(out: Path, results: list[Result]) -> Path:
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>nearfield demo</title><style>{STYLE}</style>",
        f"<h1>nearfield demo</h1><p class=sub>nearfield {nearfield.__version__}, torch {torch.__version__}</p>",
    ]
    for result in results:
        parts.append(f"<h2>{html.escape(result.title)}</h2><p>{html.escape(result.text)}</p>")
        for figure in result.figures:
            data = base64.b64encode((out / figure).read_bytes()).decode()
            parts.append(f'<img alt="{html.escape(result.title)}" src="data:image/png;base64,{data}">')
        parts.append(table_html(result.rows))
    path = out / "report.html"
    write_atomically(path, "\n".join(parts) + "\n")
    return path
