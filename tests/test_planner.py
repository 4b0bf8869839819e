"""The tile planner against boolean masks, and against published problem sizes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nearfield import _planner

Mask = np.ndarray[Any, np.dtype[np.bool_]]


def seen_keys(query: int, length: int, window: int, stride: int, causal: bool) -> range:
    """The definition, for one dimension of one dilation group."""
    group = query // stride * stride
    if causal:
        leader = min(group + stride - 1, length - 1)
        return range(max(leader - window + 1, 0), query + 1)
    leader = min(group + stride // 2, length - 1)
    start = min(max(leader - window // 2, 0), length - window)
    return range(start, start + window)


def mask_1d(length: int, window: int, stride: int, causal: bool) -> Mask:
    mask = np.zeros((length, length), dtype=bool)
    for query in range(length):
        mask[query, list(seen_keys(query, length, window, stride, causal))] = True
    return mask


def brute_force_counts(
    mask: Mask, grid: tuple[int, ...], staying: tuple[int, ...], moving: tuple[int, ...], placement: str
) -> tuple[int, int]:
    """Visited and full pairs of tiles: rows of the n-D mask stay, its columns are covered by boxes."""
    visited = full = 0
    mask = mask.reshape(grid + grid)
    for corner in itertools.product(*(range(0, x, t) for x, t in zip(grid, staying, strict=True))):
        rows = mask[tuple(slice(c, c + t) for c, t in zip(corner, staying, strict=True))]
        rows = rows.reshape(-1, *grid)
        needed = np.argwhere(rows.any(0))
        low, high = needed.min(0), needed.max(0) + 1
        first = [lo // u * u if placement == "grid" else lo for lo, u in zip(low, moving, strict=True)]
        boxes = (range(f, h, u) for f, h, u in zip(first, high, moving, strict=True))
        for origin in itertools.product(*boxes):
            box = rows[(slice(None), *(slice(o, o + u) for o, u in zip(origin, moving, strict=True)))]
            if not box.any():
                continue
            visited += 1
            inside = all(o + u <= x for o, u, x in zip(origin, moving, grid, strict=True))
            full += bool(inside and box.all())
    return visited, full


def brute_force(
    grid: tuple[int, ...],
    window: tuple[int, ...],
    q_tile: tuple[int, ...],
    kv_tile: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    causal: tuple[bool, ...],
    placement: str,
    direction: str,
) -> dict[str, int]:
    counts = dict.fromkeys(("visited", "full", "pairs", "q_tiles", "kv_tiles"), 0)
    for group in itertools.product(*(range(d) for d in dilation)):
        sub = tuple(len(range(r, x, d)) for r, x, d in zip(group, grid, dilation, strict=True))
        mask = np.ones((1, 1), dtype=bool)
        for length, w, s, c in zip(sub, window, stride, causal, strict=True):
            mask = np.kron(mask, mask_1d(length, w, s, c))
        forward = direction == "forward"
        staying, moving = (q_tile, kv_tile) if forward else (kv_tile, q_tile)
        visited, full = brute_force_counts(mask if forward else mask.T, sub, staying, moving, placement)
        counts["visited"] += visited
        counts["full"] += full
        counts["pairs"] += int(mask.sum())
        counts["q_tiles"] += int(np.prod([-(-x // t) for x, t in zip(sub, q_tile, strict=True)]))
        counts["kv_tiles"] += int(np.prod([-(-x // t) for x, t in zip(sub, kv_tile, strict=True)]))
    return counts


def assert_plan_is_exact(*problem: Any) -> None:
    grid, window, q_tile, kv_tile, stride, dilation, causal, placement, direction = problem
    plan = _planner.plan_tiles(
        grid, window, q_tile, kv_tile, stride=stride, dilation=dilation, is_causal=causal,
        placement=placement, direction=direction,
    )  # fmt: skip
    truth = brute_force(*problem)
    assert {name: getattr(plan, name) for name in truth} == truth
    assert plan.partial == truth["visited"] - truth["full"]
    assert plan.mask_free == (truth["visited"] == truth["full"])
    assert plan.cost(1.5) == truth["full"] + 1.5 * plan.partial
    tokens, m, n = (int(np.prod(sides)) for sides in (grid, q_tile, kv_tile))
    assert plan.flop_bound == pytest.approx(tokens**2 / truth["pairs"])
    assert plan.tile_bound == pytest.approx(-(-tokens // m) * -(-tokens // n) / truth["visited"])
    assert plan.utilization == pytest.approx(truth["pairs"] / (truth["visited"] * m * n))
    assert plan.q_padding == pytest.approx(truth["q_tiles"] * m / tokens - 1)
    assert plan.kv_padding == pytest.approx(truth["kv_tiles"] * n / tokens - 1)


@pytest.mark.parametrize("causal", [False, True], ids=["free", "causal"])
@pytest.mark.parametrize("length", [1, 2, 7, 12, 17])
def test_every_short_dimension(length: int, causal: bool) -> None:
    for window in range(1, length + 1):
        for stride in range(1, window + 1):
            mask = mask_1d(length, window, stride, causal)
            for i in range(length):
                keys, queries = np.flatnonzero(mask[i]), np.flatnonzero(mask[:, i])
                options = {"stride": stride, "is_causal": causal}
                assert _planner.key_range(i, length, window, **options) == (keys[0], keys[-1] + 1)
                assert _planner.query_range(i, length, window, **options) == (queries[0], queries[-1] + 1)


@pytest.mark.parametrize("placement", ["grid", "span"])
@pytest.mark.parametrize("causal", [False, True], ids=["free", "causal"])
def test_every_tile_run_of_a_dimension(causal: bool, placement: Any) -> None:
    length = 13
    for window, stride, tile in itertools.product((1, 4, 5, 9, 13), (1, 2, 3, 4, 5), (1, 2, 3, 4, 8, 16)):
        if stride > window:
            continue
        mask = mask_1d(length, window, stride, causal)
        options: dict[str, Any] = {"stride": stride, "is_causal": causal, "placement": placement}
        for first, last in itertools.combinations_with_replacement(range(length), 2):
            for function, rows in ((_planner.key_tiles, mask), (_planner.query_tiles, mask.T)):
                rows = rows[first : last + 1]
                origin, count, full_begin, full_end = function(first, last, tile, length, window, **options)
                needed = np.flatnonzero(rows.any(0))
                assert origin == (needed[0] if placement == "span" else needed[0] // tile * tile)
                assert count == -(-(needed[-1] + 1 - origin) // tile)
                starts = [origin + n * tile for n in range(count)]
                full = [n for n, x in enumerate(starts) if x + tile <= length and rows[:, x : x + tile].all()]
                assert list(range(full_begin, full_end)) == full


CASES = [
    ((20,), (6,), (4,), (4,), (1,), (1,), (False,)),
    ((20,), (6,), (4,), (3,), (2,), (3,), (True,)),
    ((12, 10), (4, 5), (4, 2), (2, 4), (2, 1), (1, 2), (False, False)),
    ((9, 16), (3, 8), (2, 8), (4, 4), (1, 8), (3, 1), (True, False)),
    ((8, 8), (4, 4), (4, 4), (4, 4), (4, 4), (1, 1), (False, False)),
    ((5, 8, 6), (5, 4, 3), (1, 4, 2), (2, 2, 2), (1, 4, 1), (1, 2, 1), (True, False, False)),
    ((4, 7, 9), (2, 3, 4), (2, 2, 4), (2, 4, 2), (2, 1, 3), (2, 1, 2), (False, True, False)),
]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("placement", ["grid", "span"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"X{case[0]}-W{case[1]}")
def test_whole_problems(case: tuple[Any, ...], placement: str, direction: str) -> None:
    assert_plan_is_exact(*case, placement, direction)


@given(st.data())
def test_random_problems(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 3), label="rank")
    limit = (24, 12, 7)[rank - 1]
    columns = []
    for _ in range(rank):
        length = data.draw(st.integers(1, limit))
        dilation = data.draw(st.integers(1, min(length, 3)))
        window = data.draw(st.integers(1, length // dilation))
        stride = data.draw(st.integers(1, window))
        tiles = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
        columns.append((length, window, *tiles, stride, dilation, data.draw(st.booleans())))
    placement = data.draw(st.sampled_from(["grid", "span"]))
    direction = data.draw(st.sampled_from(["forward", "backward"]))
    assert_plan_is_exact(*zip(*columns, strict=True), placement, direction)


HUNYUAN, FLUX, COSMOS, LINE = (30, 48, 80), (256, 256), (16, 44, 80), (32768,)

# grid, window, stride, tile of both operands; FLOP bound, tile bound and full share on the grid, tile bound
# from the span.
PUBLISHED = [
    (HUNYUAN, (18, 24, 24), 1, (2, 8, 8), 11.11, 5.44, 0.17, 6.87),
    (HUNYUAN, (18, 24, 24), (2, 8, 8), (2, 8, 8), 11.11, 11.11, 1.0, 11.11),
    (HUNYUAN, (18, 24, 24), (16, 8, 8), (2, 8, 8), 11.11, 11.11, 1.0, 11.11),
    (FLUX, 80, 1, (16, 8), 10.24, 7.51, 0.50, 8.33),
    (FLUX, 80, 16, (16, 8), 10.24, 10.24, 1.0, 10.24),
    (COSMOS, (16, 32, 48), 1, (4, 4, 8), 2.29, 2.08, 0.82, 2.08),
    (COSMOS, (16, 32, 48), (1, 8, 16), (4, 4, 8), 2.29, 2.29, 1.0, 2.29),
    (LINE, 2048, 1, (128,), 16.0, 15.1, 0.89, 15.1),
]


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"X{row[0]}-S{row[2]}")
def test_known_problems(row: tuple[Any, ...]) -> None:
    grid, window, stride, tile, flop_bound, grid_bound, full_share, span_bound = row
    on_grid = _planner.plan_tiles(grid, window, tile, tile, stride=stride, placement="grid")
    from_span = _planner.plan_tiles(grid, window, tile, tile, stride=stride, placement="span")
    digits = 1 if grid == LINE else 2
    assert round(on_grid.flop_bound, 2) == flop_bound
    assert on_grid.tile_bound == pytest.approx(grid_bound, abs=0.6 * 10**-digits)
    assert round(on_grid.full_share, 2) == full_share
    assert on_grid.mask_free == (full_share == 1.0)
    assert from_span.tile_bound == pytest.approx(span_bound, abs=0.6 * 10**-digits)


def test_frame_causal_video_needs_no_mask_with_flat_tiles() -> None:
    video: dict[str, Any] = {"grid": (30, 32, 32), "window": (30, 32, 32), "is_causal": (True, False, False)}
    flat = _planner.plan_tiles(q_tile=(1, 8, 16), kv_tile=(1, 8, 16), **video)
    assert (flat.mask_free, round(flat.tile_bound, 2)) == (True, 1.94)
    deep = _planner.plan_tiles(q_tile=(2, 8, 8), kv_tile=(2, 8, 8), **video)
    assert (round(deep.tile_bound, 2), round(deep.full_share, 2)) == (1.88, 0.88)
    q_tile, kv_tile, plan = _planner.best_tiles(**video)
    assert q_tile[0] == kv_tile[0] == 1
    assert plan.mask_free


BEST = [
    (HUNYUAN, (18, 24, 24), 128, 6.99),
    (HUNYUAN, (18, 24, 24), 64, 7.2),
    (FLUX, (80, 80), 64, 8.42),
    (COSMOS, (16, 32, 48), 128, 2.18),
]


@pytest.mark.parametrize("grid, window, block_n, bound", BEST)
def test_best_shapes_of_known_problems(
    grid: tuple[int, ...], window: tuple[int, ...], block_n: int, bound: float
) -> None:
    _, _, plan = _planner.best_tiles(grid, window, block_n=block_n, partial_cost=1.0)
    assert plan.tile_bound >= bound - 0.01


@pytest.mark.parametrize("shapes", ["powers_of_two", "exact", "fitting"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("grid, window", [((40,), (9,)), ((20, 14), (6, 5)), ((6, 9, 10), (3, 4, 5))])
def test_best_tiles_is_the_minimum(
    grid: tuple[int, ...], window: tuple[int, ...], direction: Any, shapes: Any
) -> None:
    block_m, block_n, options = 12 if shapes != "powers_of_two" else 16, 8, {"direction": direction}

    def boxes(block: int) -> list[tuple[int, ...]]:
        found = itertools.product(range(1, block + 1), repeat=len(grid))
        sizes = [(box, int(np.prod(box))) for box in found]
        if shapes == "fitting":
            return [box for box, size in sizes if size <= block]
        exact = [box for box, size in sizes if size == block]
        return [b for b in exact if shapes == "exact" or all(side & (side - 1) == 0 for side in b)]

    least = min(
        _planner.plan_tiles(grid, window, q, kv, **options).cost(1.3)
        for q in boxes(block_m)
        for kv in boxes(block_n)
    )
    q_tile, kv_tile, plan = _planner.best_tiles(
        grid, window, block_m=block_m, block_n=block_n, partial_cost=1.3, shapes=shapes, **options
    )
    assert q_tile in boxes(block_m)
    assert kv_tile in boxes(block_n)
    assert plan.cost(1.3) == pytest.approx(least, rel=1e-12)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"grid": (4, 4, 4, 4)}, "4 dimensions; supported: 1, 2 or 3"),
        ({"grid": (0, 8)}, "grid holds 0"),
        ({"window": (9, 3)}, "window 9 times dilation 1 exceeds the grid's side 8"),
        ({"window": (3, 3, 3)}, "window has 3 values, the grid has 2 dimensions"),
        ({"window": 0}, "window holds 0"),
        ({"stride": 4}, "stride 4 is not between 1 and the window 3"),
        ({"dilation": (1, 0)}, "dilation holds 0"),
        ({"dilation": 3}, "window 3 times dilation 3 exceeds"),
        ({"q_tile": (4,)}, "q_tile has 1 sides, the grid has 2"),
        ({"kv_tile": (4, 257)}, "kv_tile has a side of 257; supported: 1 to 256"),
        ({"placement": "left"}, "placement is 'left'; supported: grid, span"),
        ({"direction": "up"}, "direction is 'up'; supported: forward, backward"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    good = {"grid": (8, 8), "window": 3, "q_tile": (4, 4), "kv_tile": (4, 4)}
    _planner.plan_tiles(**good)
    with pytest.raises(ValueError, match=message):
        _planner.plan_tiles(**(good | change))


def test_wrong_blocks_and_ranges() -> None:
    with pytest.raises(ValueError, match="no box with sides up to 256 holds blocks of 100 and 128"):
        _planner.best_tiles((8, 8), 3, block_m=100)
    with pytest.raises(ValueError, match="first 3 and last 8 are not a range inside a dimension of 8"):
        _planner.key_tiles(3, 8, 4, 8, 3)
    with pytest.raises(ValueError, match="shapes is 'round'; supported: powers_of_two, exact, fitting"):
        _planner.best_tiles((8, 8), 3, shapes="round")


@given(
    st.integers(1, 96),
    st.integers(1, 200_000),
    st.sampled_from([64, 128]),
    st.sampled_from([8, 64, 72, 128, 136]),
    st.integers(1, 200),
    st.integers(0, 60),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_delta_plan_covers_every_chunk_once(
    value_heads: int,
    tokens: int,
    key_dim: int,
    value_dim: int,
    sms: int,
    clusters: int,
    channel_gate: bool,
    keep: bool,
    states: bool,
) -> None:
    span, prepare_p, preparing, of_clusters, rest = _planner.delta_plan(
        sequences=1, tokens=tokens, value_heads=value_heads, key_dim=key_dim, value_dim=value_dim, sms=sms,
        clusters=clusters, channel_gate=channel_gate, keep=keep, states_on_the_way=states,
    )  # fmt: skip
    chunks = -(-tokens // 64)
    assert 0 <= span < max(chunks, 1)
    assert 0 <= preparing < sms
    assert prepare_p or not (keep or channel_gate or span or preparing or of_clusters)
    if rest:
        assert 0 < rest < value_heads
        assert of_clusters == [[(row, 0, chunks, -1, -1)] for row in range(value_heads - rest)]
        assert preparing == sms - 4 * len(of_clusters)
        assert rest * -(-value_dim // 64) <= preparing
        value_heads -= rest
    else:
        assert (span > 0) + (preparing > 0) + (len(of_clusters) > 0) <= 1
    if not of_clusters:
        return
    assert clusters > 0
    assert 64 < value_dim <= 128
    assert not channel_gate
    assert not states
    # With what the backward needs clusters go on with their parts, else each has one.
    assert len(of_clusters) <= clusters if keep else all(len(parts) == 1 for parts in of_clusters)
    assert sum(map(len, of_clusters)) <= 96
    covered: dict[int, list[tuple[int, int]]] = {}
    handed: dict[int, tuple[int, int]] = {}  # states on their way to a later cluster: row and chunks done
    for parts in of_clusters:  # in the order in which clusters begin
        chunks_done, now_handed = 0, {}
        for at, (row, begin, end, origin, target) in enumerate(parts):
            assert 0 <= begin < end <= chunks
            assert (begin > 0) == (origin >= 0)
            assert (end < chunks) == (target >= 0)
            if origin >= 0:
                # With keep the chunks before are done when this part begins, if all are equally fast.
                assert handed.pop(origin) == (row, begin)
                assert not keep or chunks_done >= begin
            if target >= 0:
                assert at == 0
                now_handed[target] = (row, end)
            chunks_done += end - begin
            covered.setdefault(row, []).append((begin, end))
        assert not (keep and handed)
        handed |= now_handed
    assert not handed
    assert sorted(covered) == list(range(value_heads))
    for ranges in covered.values():
        ranges.sort()
        assert [0, *(end for _, end in ranges)] == [*(begin for begin, _ in ranges), chunks]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("heads", [24, 30, 34, 40])
def test_heads_beyond_the_clusters_are_cut_evenly(heads: int, keep: bool) -> None:
    *_, of_clusters, rest = _planner.delta_plan(
        sequences=1,
        tokens=32768,
        value_heads=heads,
        key_dim=128,
        value_dim=128,
        sms=132,
        clusters=30,
        keep=keep,
    )
    assert rest == 0
    if heads <= 30:
        assert of_clusters == [[(row, 0, 512, -1, -1)] for row in range(heads)]
        return
    piece = -(-heads * 512 // 30)
    assert sum(map(len, of_clusters)) == heads + 30 - 1
    work = [sum(end - begin for _, begin, end, _, _ in parts) for parts in of_clusters]
    if keep:
        assert len(work) == 30
        assert set(work[:-1]) == {piece}
        assert work[-1] <= piece
    else:
        assert max(work) <= piece


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("sequences", "tokens", "heads", "group", "rest", "with_kept"),
    [
        (1, 32768, 30, 1, 0, 0),
        (1, 32768, 31, 1, 1, 1),
        (1, 32768, 31, 31, 0, 0),
        (1, 32768, 32, 1, 2, 0),
        (1, 32768, 32, 2, 2, 0),
        (1, 32768, 32, 4, 0, 0),
        (1, 32768, 33, 1, 0, 0),
        (1, 8192, 31, 1, 1, 1),
        (1, 8192, 32, 1, 0, 0),
        (2, 32768, 16, 1, 2, 0),
        (16, 32768, 2, 1, 2, 0),
        (31, 32768, 1, 1, 1, 1),
        (32, 32768, 1, 1, 0, 0),
    ],
)
def test_heads_for_which_no_cluster_is_left_take_the_other_multiprocessors(
    sequences: int, tokens: int, heads: int, group: int, rest: int, with_kept: int, keep: bool
) -> None:
    """Whole groups of value heads of one sequence, and so few that they are done with the clusters."""
    rest = with_kept if keep else rest
    span, _, preparing, of_clusters, found = _planner.delta_plan(
        sequences=sequences, tokens=tokens, value_heads=heads, heads=heads // group, key_dim=128, value_dim=128,
        sms=132, clusters=30, keep=keep,
    )  # fmt: skip
    assert found == rest
    if found:
        assert preparing == 132 - 4 * len(of_clusters)
        assert len(of_clusters) == sequences * heads - rest
        assert 0 < span < tokens // 64


@pytest.mark.parametrize(
    ("sequences", "tokens", "heads", "keep", "beside"),
    [(1, 8192, 16, False, 100), (1, 8192, 16, True, 0), (4, 4096, 16, False, 0)],
)
def test_chunks_with_a_gate_per_channel_are_prepared_beside_few_walks(
    sequences: int, tokens: int, heads: int, keep: bool, beside: int
) -> None:
    """Where the walks leave most of the GPU idle, and only without what the backward keeps."""
    span, _, preparing, of_clusters, _ = _planner.delta_plan(
        sequences=sequences, tokens=tokens, value_heads=heads, key_dim=128, value_dim=128, sms=132, clusters=30,
        channel_gate=True, keep=keep,
    )  # fmt: skip
    assert (preparing, of_clusters) == (beside, [])
    assert span == 0 or not beside
