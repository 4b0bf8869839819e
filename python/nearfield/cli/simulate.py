"""``simulate``: what neighborhood attention on a grid can save, counted as the kernels do it, without running it."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from nearfield.cli.refusal import Refused

try:
    from nearfield import _planner
except ImportError:  # a portable wheel
    _planner = None  # type: ignore[assignment]

Direction = Literal["forward", "backward"]
Placement = Literal["span", "grid"]
PARTIAL_COST = (
    1.1  # time of a tile with a mask in units of one without, as the kernels plan (csrc/gna/README.md)
)
# By the number of dimensions. One head of more tokens does not fit a GPU, and the search would take minutes.
LONGEST, MOST_TOKENS = {1: 2**22, 2: 2**14, 3: 2**11}, 2**28
T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]

    @property
    def options(self) -> dict[str, Any]:
        return {"stride": self.stride, "dilation": self.dilation, "is_causal": self.causal}


@dataclass(frozen=True)
class Tiling:
    """How a kernel covers a problem, and what that costs.

    A box may fill only part of the kernel's block of ``block_m`` queries or ``block_n`` keys. The whole block is multiplied
    all the same, and keys that are not there need a mask in every tile.
    """

    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    plan: _planner.TilePlan
    block_m: int
    block_n: int

    @property
    def tile_bound(self) -> float:
        """Largest speedup over dense attention with whole blocks."""
        dense = math.ceil(self.plan.tokens / self.block_m) * math.ceil(self.plan.tokens / self.block_n)
        return dense / self.plan.visited

    @property
    def mask_free(self) -> float:
        """Share of the visited tiles."""
        return self.plan.full_share if math.prod(self.kv_tile) == self.block_n else 0.0

    @property
    def speedup(self) -> float:
        """Predicted over dense attention, if time were the tiles alone."""
        return self.tile_bound / self.tile_cost

    @property
    def tile_cost(self) -> float:
        """Mean, in full tiles."""
        return self.mask_free + PARTIAL_COST * (1 - self.mask_free)

    @property
    def utilization(self) -> float:
        """Needed over multiplied (query, key) pairs."""
        return self.plan.pairs / (self.plan.visited * self.block_m * self.block_n)

    def numbers(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "q_tile": self.q_tile,
            "kv_tile": self.kv_tile,
            "tokens": plan.tokens,
            "sparsity": 1 - 1 / plan.flop_bound,
            "flop_bound": plan.flop_bound,
            "tile_bound": self.tile_bound,
            "predicted_speedup": self.speedup,
            "visited_tiles": plan.visited,
            "mask_free_share": self.mask_free,
            "utilization": self.utilization,
            "q_padding": plan.q_padding,
            "kv_padding": plan.kv_padding,
        }


# ------------------------------------------------------------------------------------------------- command line


def main(
    grid: Annotated[str, typer.Argument(help="Sides of the token grid, e.g. 30x48x80.")],
    window: Annotated[str, typer.Option(help="Window per dimension, e.g. 18,24,24; -1: the whole one.")] = "",
    stride: Annotated[str, typer.Option(help="Queries that share a window, per dimension.")] = "1",
    dilation: Annotated[str, typer.Option(help="Distance of the keys, per dimension.")] = "1",
    causal: Annotated[str, typer.Option(help="yes or no per dimension, e.g. yes,no,no.")] = "no",
    sparsity: Annotated[
        float | None, typer.Option(help="Search windows and strides that leave out this share of the pairs.")
    ] = None,
    head_dim: Annotated[int, typer.Option(help="Decides how many tokens a tile of the kernel holds.")] = 128,
    backward: Annotated[bool, typer.Option("--backward", help="Gradients of keys and values.")] = False,
    q_tile: Annotated[str, typer.Option(help="Sides of a query tile instead of the kernel's.")] = "",
    kv_tile: Annotated[str, typer.Option(help="Sides of a key tile instead of the kernel's.")] = "",
    placement: Annotated[
        str,
        typer.Option(help="span: tiles begin where windows do, as in our kernels; grid: on a fixed grid."),
    ] = "span",
    query: Annotated[str, typer.Option(help="The query of the picture; the middle by default.")] = "",
    picture: Annotated[Path | None, typer.Option(help="Draw a window and its tiles into this PNG.")] = None,
    most: Annotated[int, typer.Option(help="Rows of the tables of suggestions.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Count what neighborhood attention on a grid can save, before any run; find strides, windows and tiles.

    With --window: bounds, tiles and the strides that save most. With --sparsity: the windows and strides that save most
    at that sparsity.
    """
    if _planner is None:
        raise Refused("this build has no planner (a portable wheel); install nearfield from its source")
    sides = integers("grid", grid, "x" if "x" in grid else ",")
    if not 1 <= len(sides) <= 3:
        raise Refused(f"grid is {grid or 'empty'}: it has {len(sides)} dimensions; supported: 1, 2 or 3")
    if max(sides) > LONGEST[len(sides)] or math.prod(sides) > MOST_TOKENS:
        longest = f"sides up to {LONGEST[len(sides)]} in {len(sides)} dimension{'s' * (len(sides) > 1)}"
        raise Refused(f"grid is {grid}; supported: {longest}, and {MOST_TOKENS} tokens")
    if not window and sparsity is None:
        raise Refused(
            "neither --window nor --sparsity is given: name a window, or the sparsity to search windows for"
        )
    if window and sparsity is not None:
        raise Refused(
            "--window and --sparsity are both given: name a window, or the sparsity to search windows for"
        )
    if head_dim < 1 or head_dim > 256:
        raise Refused(f"head-dim is {head_dim}; supported: 1 to 256")
    if placement not in ("span", "grid"):
        raise Refused(f"placement is {placement}; supported: span, grid")
    if most < 1:
        raise Refused(f"most is {most}; it must be at least 1")
    direction: Direction = "backward" if backward else "forward"
    count = Counter(head_dim, direction, placement)  # type: ignore[arg-type]
    n = len(sides)
    given_stride = per_dimension("stride", integers("stride", stride), n)
    dilations = per_dimension("dilation", integers("dilation", dilation), n)
    causals = per_dimension("causal", booleans("causal", causal), n)
    report: dict[str, Any] = {"grid": sides, "dilation": dilations, "causal": causals, "direction": direction}
    if sparsity is None:
        windows = per_dimension("window", integers("window", window), n)
        windows = tuple(
            x // d if w == -1 and d > 0 else w for w, x, d in zip(windows, sides, dilations, strict=True)
        )
        problem = Problem(sides, windows, given_stride, dilations, causals)
        tiling = count(problem, integers("q-tile", q_tile), integers("kv-tile", kv_tile))
        suggestions = best_strides(problem, count)[:most]
        if problem not in (other for other, _ in suggestions):
            suggestions.append((problem, tiling))
    else:
        if not 0 < sparsity < 1:
            raise Refused(f"sparsity is {sparsity:g}; it must be between 0 and 1")
        found = best_windows(sides, dilations, causals, sparsity, count)
        if not found:
            raise Refused(
                f"no window on {grid} with dilation {dilation} leaves out {sparsity:.0%} of the pairs"
            )
        problem, tiling = found[0]
        suggestions = found[:most]
    report |= {"window": problem.window, "stride": problem.stride, **tiling.numbers()}
    report["suggestions"] = [{"window": p.window, "stride": p.stride, **t.numbers()} for p, t in suggestions]
    if picture is not None:
        at = integers("query", query) or tuple(x // 2 for x in sides)
        report["query"] = at
        draw(problem, tiling, placement, at, direction, picture)  # type: ignore[arg-type]
        report["picture"] = str(picture)
    elif query:
        raise Refused("--query is given without --picture: name the file to draw into")
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        show(problem, tiling, suggestions, picture)


def integers(name: str, text: str, joint: str = ",") -> tuple[int, ...]:
    parts = text.split(joint) if text else []
    if not all(re.fullmatch(r"-?[0-9]+", part.strip()) for part in parts):
        by = {",": "commas", "x": "x"}[joint]
        raise Refused(f"{name} is {text}: whole numbers separated by {by} are expected")
    for part in parts:
        if len(part.strip()) > 12 or abs(int(part)) >= 2**31:  # the planner counts in 32 bits
            raise Refused(f"{name} holds {part.strip()}; supported: numbers below 2147483648")
    return tuple(int(part) for part in parts)


def booleans(name: str, text: str) -> tuple[bool, ...]:
    words = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}
    try:
        return tuple(words[part.lower()] for part in text.split(","))
    except KeyError:
        raise Refused(f"{name} is {text}: yes or no, separated by commas, is expected") from None


def per_dimension(name: str, values: tuple[T, ...], n: int) -> tuple[T, ...]:
    if len(values) not in (1, n):
        raise Refused(f"{name} has {len(values)} values; the grid has {n} dimensions, so give 1 or {n}")
    return values if len(values) == n else values * n


# ------------------------------------------------------------------------------------------------------ counting


@dataclass(frozen=True)
class Counter:
    """Counts problems as a kernel for this head dim does."""

    head_dim: int
    direction: Direction = "forward"
    placement: Placement = "span"

    def __call__(
        self, problem: Problem, q_tile: tuple[int, ...] = (), kv_tile: tuple[int, ...] = ()
    ) -> Tiling:
        """With the tiles that are given, or those that the kernel would choose."""
        common = {"placement": self.placement, "direction": self.direction, **problem.options}
        try:
            if q_tile or kv_tile:
                tiles = q_tile or kv_tile, kv_tile or q_tile
                plan = _planner.plan_tiles(problem.grid, problem.window, *tiles, **common)
                return Tiling(*tiles, plan, *map(math.prod, tiles))
            # The rule of csrc/gna/plan.cpp.
            tilings: list[tuple[float, Tiling]] = []
            for block_m, block_n, visit_cost in _planner.kernel_blocks(
                self.head_dim, direction=self.direction
            ):
                if tilings and max(problem.dilation) > 1:
                    break
                blocks: dict[str, Any] = {"block_m": block_m, "block_n": block_n}
                choice = _planner.best_tiles(
                    problem.grid,
                    problem.window,
                    **blocks,
                    **common,
                    partial_cost=PARTIAL_COST,
                    shapes="fitting",
                )
                tiling = Tiling(*choice, block_m, block_n)
                tilings.append((tiling.plan.visited * tiling.tile_cost * visit_cost, tiling))
            return min(tilings, key=lambda choice: choice[0])[1]
        except ValueError as error:
            raise Refused(str(error)) from None


Found = list[tuple[Problem, Tiling]]


def best_strides(problem: Problem, count: Callable[[Problem], Tiling]) -> Found:
    """The window of a problem with other strides, fastest first; of equals the one with the finest strides."""
    choices = itertools.product(
        *(stride_choices(w, x) for w, x in zip(problem.window, problem.grid, strict=True))
    )
    found = []
    for stride in choices:
        other = Problem(problem.grid, problem.window, stride, problem.dilation, problem.causal)
        found.append((other, count(other)))
    return sorted(found, key=_rank)


def best_windows(
    grid: tuple[int, ...], dilation: tuple[int, ...], causal: tuple[bool, ...], sparsity: float,
    count: Callable[[Problem], Tiling],
) -> Found:  # fmt: skip
    """Windows that keep the wanted share of pairs, or up to a twentieth less, with their best strides."""
    kept = 1 - sparsity
    count(
        Problem(grid, (1,) * len(grid), (1,) * len(grid), dilation, causal)
    )  # refuses a wrong grid or dilation
    # Dimension by dimension: windows, and the share of the pairs that each keeps.
    shares = [
        {w: kept_share(x, w, d, c) for w in window_choices(x // d, 64 if len(grid) == 1 else 32)}
        for x, d, c in zip(grid, dilation, causal, strict=True)
    ]
    candidates = [
        Problem(grid, tuple(w for w, _ in chosen), (1,) * len(grid), dilation, causal)
        for chosen in itertools.product(*(dimension.items() for dimension in shares))
        if 0.95 * kept <= math.prod(share for _, share in chosen) <= kept
    ]
    # Windows of the grid's own proportions see equally far in every direction; a search of the longest list takes seconds.
    candidates.sort(key=_lopsided)
    best = [best_strides(problem, count) for problem in candidates[:SEARCHED]]
    return sorted(itertools.chain.from_iterable(found[:2] for found in best), key=_rank)


SEARCHED = 20  # windows


def window_choices(longest: int, fine: int) -> list[int]:
    """Every window up to ``fine``; then neighbors differ by a share of ``2 / fine`` at most."""
    found, step = {longest, *range(1, min(longest, fine) + 1)}, 2
    while step * fine // 2 <= longest:
        found |= {*range(step * fine // 2, min(longest, step * fine) + 1, step)}
        step *= 2
    return sorted(found)


def kept_share(side: int, window: int, dilation: int, causal: bool) -> float:
    """Of the pairs in one dimension."""
    tile = (min(side, 64),)  # any: the number of pairs does not depend on it
    options: dict[str, Any] = {"dilation": (dilation,), "is_causal": (causal,)}
    return 1 / _planner.plan_tiles((side,), (window,), tile, tile, **options).flop_bound


def stride_choices(window: int, side: int) -> list[int]:
    """1, powers of two up to 16, and the whole window (blocks); a window over the whole side needs no stride."""
    if window == side:
        return [1]
    return sorted({1, window, *(2**i for i in range(1, 5) if 2**i < window)})


def _lopsided(problem: Problem) -> float:
    shares = [w * d / x for w, d, x in zip(problem.window, problem.dilation, problem.grid, strict=True)]
    return max(shares) / min(shares)


def _rank(found: tuple[Problem, Tiling]) -> tuple[float, float, float]:
    problem, tiling = found
    # Speedups that differ by less than a percent are equal: the model is no better than that.
    return -round(math.log(tiling.speedup) / 0.01), math.prod(problem.stride), _lopsided(problem)


# -------------------------------------------------------------------------------------------------------- output


def draw(
    problem: Problem, tiling: Tiling, placement: Placement, query: tuple[int, ...], direction: Direction, path: Path
) -> None:  # fmt: skip
    if direction == "backward":
        raise Refused("--picture shows what a query sees; leave out --backward")
    if len(query) != len(problem.grid) or any(
        not 0 <= x < side for x, side in zip(query, problem.grid, strict=True)
    ):
        raise Refused(
            f"query is {_sides(query, ',')}; it must be a position of the grid {_sides(problem.grid)}"
        )
    if path.suffix != ".png":
        raise Refused(f"picture is {path}; supported: a name that ends in .png")
    from nearfield.cli.picture import draw_window

    draw_window(problem, tiling, placement, query, path)


def show(problem: Problem, tiling: Tiling, suggestions: Found, picture: Path | None) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = 120
    plan = tiling.plan
    title = f"{_sides(problem.grid)} tokens, window {_sides(problem.window)}, stride {_sides(problem.stride)}"
    if max(problem.dilation) > 1:
        title += f", dilation {_sides(problem.dilation)}"
    if any(problem.causal):
        title += f", causal in {', '.join(str(i + 1) for i, c in enumerate(problem.causal) if c)}"
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in (
        ("pairs left out", f"{1 - 1 / plan.flop_bound:.1%}"),
        ("largest speedup over dense attention by arithmetic", f"{plan.flop_bound:.2f}x"),
        ("the same with whole tiles", f"{tiling.tile_bound:.2f}x"),
        ("predicted, a tile with a mask at 1.1", f"{tiling.speedup:.2f}x"),
        ("query tile, key tile", f"{_sides(tiling.q_tile)}, {_sides(tiling.kv_tile)}"),
        ("visited tiles", f"{plan.visited:,}, {tiling.mask_free:.1%} of them without a mask"),
        ("work on needed pairs", f"{tiling.utilization:.1%}"),
        ("padding of queries, of keys", f"{plan.q_padding:.1%}, {plan.kv_padding:.1%}"),
    ):
        table.add_row(name, value)
    console.print(table)
    table = Table(
        "window", "stride", "sparsity", "by arithmetic", "whole tiles", "predicted", "mask-free", "query tile", "key tile",
        title="Fastest choices", title_justify="left",
    )  # fmt: skip
    for other, t in suggestions:
        table.add_row(
            _sides(other.window), _sides(other.stride), f"{1 - 1 / t.plan.flop_bound:.1%}",
            f"{t.plan.flop_bound:.2f}x", f"{t.tile_bound:.2f}x", f"{t.speedup:.2f}x",
            f"{t.mask_free:.0%}", _sides(t.q_tile), _sides(t.kv_tile),
            style="bold" if other == problem else "",
        )  # fmt: skip
    console.print(table)
    if picture is not None:
        console.print(f"picture: {picture}", markup=False, highlight=False)


def _sides(values: tuple[int, ...], joint: str = "x") -> str:
    return joint.join(map(str, values))
