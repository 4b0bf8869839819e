"""Tables and plots of result files; bench/README.md describes the files."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nearfield._files import write_atomically

Row = dict[str, Any]
Data = dict[str, Any]

PASSES = {"fwd": "forward", "bwd": "backward", "fwdbwd": "forward and backward"}
PEERS = {
    "cudnn": "cuDNN (dense)",
    "flash": "FlashAttention-2 (dense)",
    "dense": "PyTorch (dense)",
    "sdpa": "softmax attention",
    "float8": "itself in float8_e4m3fn",
    "natten": "NATTEN",
    "fla": "fla",
    "flex": "FlexAttention",
    "copy": "a copy of the states",
}
TIME = re.compile(rf"^(?:(\w+?)_)?({'|'.join(PASSES)})_ms$")


def load(path: Path) -> Data:
    """A result file; ValueError says what is wrong with it."""
    try:
        data: Any = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    rows = data.get("rows") if isinstance(data, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "case" in row for row in rows):
        raise ValueError(f"{path} holds no rows with cases; bench/README.md describes the file")
    # Files from before the field was written are named <machine>-<group>.json.
    return {"group": path.stem.rsplit("-", 1)[-1], **data}


def times(row: Row) -> dict[str, dict[str, float]]:
    """pass -> contender ("" is ours) -> milliseconds."""
    found: dict[str, dict[str, float]] = {name: {} for name in PASSES}
    for key, value in row.items():
        match = TIME.match(key)
        if match and match[1] != "target" and isinstance(value, (int, float)):
            found[match[2]][match[1] or ""] = float(value)
    return {name: by_contender for name, by_contender in found.items() if "" in by_contender}


def peers(rows: Sequence[Row]) -> list[str]:
    """In the order of PEERS, then of appearance."""
    seen = {peer: None for row in rows for by in times(row).values() for peer in by if peer}
    return sorted(seen, key=lambda peer: list(PEERS).index(peer) if peer in PEERS else len(PEERS))


def about(data: Data) -> str:
    """Where and with what the numbers were taken."""
    machine = data.get("gpu") or f"CPU ({data.get('cpu', '?')}, {data.get('threads', '?')} threads)"
    parts = [machine, f"torch {data.get('torch', '?')}", f"commit {data.get('commit', '?')}"]
    if "ceiling_tflops" in data and not data.get("scaled_down"):
        parts.append(f"ceilings {data['ceiling_tflops']:.0f} TFLOP/s and {data['ceiling_gbs']:.0f} GB/s")
    dtypes = dict.fromkeys(row["dtype"] for row in data["rows"] if "dtype" in row)
    text = ", ".join([*parts, *dtypes])
    return f"{text}. Scaled-down cases: no GPU was there." if data.get("scaled_down") else f"{text}."


def table(data: Data, name: str) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of one pass: times, the share of the roofline, and how many times slower each peer is."""
    rows = [row for row in data["rows"] if name in times(row)]
    others = [peer for peer in peers(rows) if any(peer in times(row)[name] for row in rows)]
    with_target = any(row.get(f"{name}_target_ms") for row in rows)
    with_roofline = any(f"{name}_roofline" in row for row in rows)
    with_share = any("attention_share" in row for row in rows)
    with_rate = any(f"{name}_useful_tflops" in row for row in rows)
    headings = [
        "case",
        "ms",
        *(["target"] * with_target),
        *(["TFLOP/s"] * with_rate),
        *(["of roofline"] * with_roofline),
        *(["attention's share"] * with_share),
    ]
    headings += [PEERS.get(peer, peer) for peer in others]
    cells = []
    for row in rows:
        ours, by = times(row)[name][""], times(row)[name]
        line = [str(row["case"]), number(ours)]
        if with_target:
            line.append(number(row[f"{name}_target_ms"]) if row.get(f"{name}_target_ms") else "")
        if with_rate:
            line.append(number(row[f"{name}_useful_tflops"]) if f"{name}_useful_tflops" in row else "")
        if with_roofline:
            line.append(f"{row[f'{name}_roofline']:.0%}" if f"{name}_roofline" in row else "")
        if with_share:
            line.append(f"{row['attention_share']:.0%}" if "attention_share" in row else "")
        line += [f"{number(by[peer])} ({by[peer] / ours:.2f}x)" if peer in by else "" for peer in others]
        cells.append(line)
    return headings, cells


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def markdown(data: Data) -> str:
    """One table per pass, under a line that says where the numbers come from."""
    parts = [about(data)]
    for name, title in PASSES.items():
        headings, cells = table(data, name)
        if cells:
            ruler = ["---", *["---:"] * (len(headings) - 1)]
            lines = (f"| {' | '.join(line)} |" for line in [headings, ruler, *cells])
            parts.append("\n".join([f"**{title.capitalize()}**", "", *lines]))
    return "\n\n".join(parts) + "\n"


def insert(text: str, group: str, content: str) -> str:
    """``text`` with ``content`` between its comments ``<!-- bench: group -->`` and ``<!-- /bench -->``."""
    begin, end = f"<!-- bench: {group} -->", "<!-- /bench -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"no place for the table: {begin} and {end} are expected")
    return f"{before}{begin}\n{content.strip()}\n{end}{after}"


def plot(data: Data, title: str = "") -> bytes:
    """A PNG with one panel per pass: times faster than each peer, or without peers milliseconds."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    shown = [name for name in PASSES if any(name in times(row) for row in data["rows"])]
    if not shown:
        raise ValueError("the results hold no times to plot")
    rows = [row for row in data["rows"] if times(row)]
    others = peers(rows)
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        height = (0.2 + 0.2 * max(1, len(others))) * len(rows) + 1.6
        figure = Figure(figsize=(1.5 + 5.5 * len(shown), height), layout="constrained")
        panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for panel, name in zip(panels, shown, strict=True):
            _panel(panel, rows, name, others)
        panels[0].set_yticks(range(len(rows)), [str(row["case"]) for row in rows])
        panels[0].invert_yaxis()
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=3, frameon=False)
        figure.suptitle(f"{title or data['group']}: {about(data)}", x=0.01, ha="left", fontsize=9)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=130)
    return out.getvalue()


def write_beside(path: Path, title: str) -> None:
    """The Markdown and the plot of a result file, next to it."""
    data = load(path)
    write_atomically(path.with_suffix(".md"), f"# {title}\n\n{markdown(data)}")
    write_atomically(path.with_suffix(".png"), plot(data, title))


def _panel(panel: Any, rows: Sequence[Row], name: str, others: Sequence[str]) -> None:
    colors = ["#2f6fb2", "#0b6e4f", "#b5651d", "#7a4fa3"]
    if not others:
        bars = [times(row).get(name, {}).get("", 0.0) for row in rows]
        panel.barh(range(len(rows)), bars, color=colors[0], label="nearfield")
        panel.set_xlabel("milliseconds")
    if any("flop_bound" in row for row in rows) and others:
        bounds = [row.get("flop_bound", 0.0) for row in rows]
        panel.barh(
            range(len(rows)), bounds, height=0.9, color="#e4e7eb", label="bound by arithmetic over dense"
        )
    width = 0.7 / max(1, len(others))
    for i, peer in enumerate(others):
        bars = [t[peer] / t[""] if peer in (t := times(row).get(name, {})) else 0.0 for row in rows]
        at = [y + (i - (len(others) - 1) / 2) * width for y in range(len(rows))]
        panel.barh(
            at, bars, height=width, color=colors[i % len(colors)], label=f"over {PEERS.get(peer, peer)}"
        )
        for y, bar in zip(at, bars, strict=True):
            if bar:
                panel.text(bar, y, f" {bar:.2f}x", va="center", fontsize=7)
    if others:
        panel.set_xscale("log")
        panel.axvline(1, color="#444444", linewidth=0.8)
        panel.set_xlabel("times faster")
    panel.set_title(PASSES[name], loc="left")
