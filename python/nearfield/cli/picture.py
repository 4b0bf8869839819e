"""The window of one query, its tile, and the key tiles that the tile visits: drawn in every plane through the query."""

from __future__ import annotations

import io
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from nearfield import _planner
from nearfield._files import write_atomically
from nearfield.cli.simulate import Placement, Problem, Tiling

WINDOW, TILE, FULL, PARTIAL = "#2f6fb2", "#0b6e4f", "#dfe9f5", "#fdf0d5"
FULL_EDGE, PARTIAL_EDGE = "#7f9dbd", "#c9a227"


@dataclass(frozen=True)
class Axis:
    """One dimension of the dilation group that the query is in. Ranges are half-open."""

    name: str
    length: int
    index: int  # of the query
    queries: tuple[int, int]  # of its tile
    keys: tuple[int, int]  # that it sees
    tile: int  # side of a key tile
    origin: int  # of the first key tile
    count: int
    full: tuple[int, int]  # key tiles without a mask

    def tiles(self) -> list[tuple[int, bool]]:
        """Begin of every visited tile, and whether it needs no mask in this dimension."""
        return [(self.origin + n * self.tile, self.full[0] <= n < self.full[1]) for n in range(self.count)]

    def tile_of_query(self) -> bool | None:
        """Whether the visited tile at the query's own index needs no mask; None: no tile is there."""
        return next((full for begin, full in self.tiles() if 0 <= self.index - begin < self.tile), None)


def axes_through(
    query: tuple[int, ...], problem: Problem, tiling: Tiling, placement: Placement = "span"
) -> list[Axis]:
    found = []
    for i, x in enumerate(query):
        d, window, side = problem.dilation[i], problem.window[i], tiling.q_tile[i]
        residue, index = x % d, x // d
        length = (problem.grid[i] - residue + d - 1) // d
        first = index // side * side
        last = min(first + side, length) - 1
        options: dict[str, Any] = {"stride": problem.stride[i], "is_causal": problem.causal[i]}
        origin, count, *full = _planner.key_tiles(
            first, last, tiling.kv_tile[i], length, window, placement=placement, **options
        )
        name = f"dimension {i + 1}" + (f", dilation group {residue} of {d}" if d > 1 else "")
        keys = _planner.key_range(index, length, window, **options)
        found.append(
            Axis(
                name,
                length,
                index,
                (first, last + 1),
                keys,
                tiling.kv_tile[i],
                origin,
                count,
                (full[0], full[1]),
            )
        )
    return found


FLAT = Axis("", 1, 0, (0, 1), (0, 1), 1, 0, 1, (0, 1))  # the second dimension of a line


def draw_window(
    problem: Problem, tiling: Tiling, placement: Placement, query: tuple[int, ...], path: Path
) -> None:
    axes = axes_through(query, problem, tiling, placement)
    if len(axes) == 1:
        axes.insert(0, FLAT)
    filled = math.prod(tiling.kv_tile) == tiling.block_n  # else every tile has a mask
    planes = list(itertools.combinations(range(len(axes)), 2))
    with mpl.rc_context({"font.size": 9, "hatch.linewidth": 0.5}):
        # Panels are 5 inches wide and as high as their grid's proportions ask.
        height = max(axes[down].length / axes[right].length for down, right in planes)
        height = 0.7 if axes[0] is FLAT else min(max(5 * height, 1.5), 7.0)
        width = 5.2 * len(planes) + (1.4 if len(planes) == 1 else 0)
        figure = Figure(figsize=(width, height + 1.8), layout="constrained")
        for panel, plane in enumerate(planes):
            others = [axis.tile_of_query() for i, axis in enumerate(axes) if i not in plane]
            _draw_plane(
                figure.add_subplot(1, len(planes), panel + 1), axes[plane[0]], axes[plane[1]], others, filled
            )
        figure.suptitle(
            f"query {', '.join(map(str, query))}: {tiling.plan.flop_bound:.2f}x fewer pairs than dense attention,\n"
            f"{tiling.tile_bound:.2f}x fewer tiles, {tiling.mask_free:.0%} of them without a mask",
            x=0.01, ha="left",
        )  # fmt: skip
        figure.legend(
            handles=[
                Patch(facecolor=FULL, edgecolor=FULL_EDGE, label="visited, no mask"),
                Patch(facecolor=PARTIAL, edgecolor=PARTIAL_EDGE, hatch="////", label="visited, with a mask"),
                Patch(facecolor="none", edgecolor=WINDOW, linewidth=2, label="window of the query"),
                Patch(facecolor="none", edgecolor=TILE, linewidth=2, label="query tile"),
            ],
            loc="outside lower left", ncols=2 if len(planes) == 1 else 4, frameon=False,
        )  # fmt: skip
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=140)
    write_atomically(path, data.getvalue())


def _draw_plane(panel: Any, down: Axis, right: Axis, others: list[bool | None], filled: bool) -> None:
    """A tile needs no mask if it needs none in any dimension; ``others`` says so of those that the plane cuts."""
    panel.add_patch(Rectangle((0, 0), right.length, down.length, facecolor="white", edgecolor="#888888"))
    if None not in others:
        for (y, full_y), (x, full_x) in itertools.product(down.tiles(), right.tiles()):
            full = filled and full_x and full_y and all(others)
            panel.add_patch(
                Rectangle(
                    (x, y), right.tile, down.tile, hatch=None if full else "////", linewidth=0.8,
                    facecolor=FULL if full else PARTIAL, edgecolor=FULL_EDGE if full else PARTIAL_EDGE,
                )
            )  # fmt: skip
    for across, along, color in ((right.queries, down.queries, TILE), (right.keys, down.keys, WINDOW)):
        (left, end), (top, bottom) = across, along
        panel.add_patch(
            Rectangle((left, top), end - left, bottom - top, fill=False, edgecolor=color, linewidth=2)
        )
    panel.plot(right.index + 0.5, down.index + 0.5, "o", color=WINDOW, markersize=4)
    ends = [max(axis.length, axis.origin + axis.count * axis.tile) for axis in (right, down)]
    panel.set_xlim(-0.5, ends[0] + 0.5)
    panel.set_ylim(ends[1] + 0.5, -0.5)
    panel.set_xlabel(right.name)
    panel.spines[:].set_visible(False)
    if down is FLAT:
        panel.set_yticks([])
    else:
        panel.set_aspect("equal")
        panel.set_ylabel(down.name)
