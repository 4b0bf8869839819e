"""What explain tells is what the definition of the operator says, and what runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nearfield import (
    delta,
    delta_rule,
    delta_rule_step,
    explain,
    gna,
    local_linear_attention,
    neighborhood_attention,
    neighborhood_local_linear_attention,
    probe_attention,
)
from nearfield._runtime import devices_with_kernel
from nearfield.delta.explain import Pass
from nearfield.gna.reference import neighborhood_mask, visible_keys
from nearfield.lla import reference as lla_reference
from torch import Tensor

needs_kernels = pytest.mark.skipif(
    "cuda" not in devices_with_kernel("gna_fwd"), reason="this build has no CUDA kernels: nothing to plan"
)


@pytest.fixture(autouse=True)
def not_deterministic(poisoned_memory: None) -> None:
    """The fixture that poisons memory turns deterministic algorithms on, which selects other kernels."""
    torch.use_deterministic_algorithms(False)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ask(q: Tensor, *args: Any, architecture: str | None = "sm_90", **kwargs: Any) -> Any:
    found = explain(neighborhood_attention, q, q, q, *args, architecture=architecture, **kwargs)
    assert isinstance(found, gna.NeighborhoodExplanation)
    return found


def tiles_along(length: int, window: tuple[Any, ...], staying: int, moving: int, queries_stay: bool) -> Any:
    """Visited and mask-free tiles of one dimension without dilation, counted element by element."""
    seen = [set(visible_keys(x, length, *window)) for x in range(length)]
    if not queries_stay:
        seen = [{x for x in range(length) if y in seen[x]} for y in range(length)]
    visited = full = 0
    for first in range(0, length, staying):
        rows = seen[first : first + staying]
        union, common = set.union(*rows), set.intersection(*rows)
        for begin in range(min(union), max(union) + 1, moving):
            visited += 1
            full += all(y in common for y in range(begin, begin + moving))
    return visited, full


GRIDS: list[tuple[tuple[int, ...], tuple[tuple[Any, ...], ...]]] = [
    ((1000,), ((300, 1, 1, False),)),
    ((900,), ((257, 32, 1, True),)),
    ((40, 56), ((13, 1, 1, False), (16, 8, 1, False))),
    ((6, 20, 24), ((6, 1, 1, True), (7, 1, 1, False), (8, 4, 1, False))),
]


@needs_kernels
def test_bias_and_periodic_border_are_told() -> None:
    q = meta(1, 40, 48, 4, 64)
    plain = ask(q, (7, 9))
    biased = ask(q, (7, 9), bias=torch.zeros(4, 13, 17))
    # Hopper's kernels take the bias, and one of them makes its gradient.
    assert biased.forward.because is None
    assert biased.backward.because is None
    assert [step.kernel for step in biased.forward.steps] == ["fwd_sm90"]
    gradients = [step.kernel for step in biased.backward.steps if step.q_tile is not None]
    assert gradients == ["bwd_dbias_sm90", "bwd_sm90"]
    # A table of float32 for each of the 132 / 4 CTAs of a head, for each head.
    tables = 33 * 4 * 13 * 17 * 4
    assert biased.backward.workspace_bytes == plain.backward.workspace_bytes + tables
    portable = ask(q, (7, 9), bias=torch.zeros(4, 13, 17), backend="portable")
    kernels = [step.kernel for step in portable.backward.steps if step.q_tile is not None]
    assert kernels == ["bwd_dbias_sm80", "bwd_dkv_sm80", "bwd_dq_sm80"]
    # The portable kernel has three times the CTAs.
    assert portable.backward.workspace_bytes == 40 * 48 * 4 * 8 + 3 * tables + 4
    # Windows with more cells than Hopper's kernel has room for.
    long = ask(meta(1, 60000, 1, 64), (20000,), bias=torch.zeros(1, 39999))
    kernels = [step.kernel for step in long.backward.steps if step.q_tile is not None]
    assert kernels == ["bwd_dbias_sm80", "bwd_sm90"]
    circle = ask(q, (7, 9), periodic=(False, True))
    assert circle.forward.because is None
    assert circle.flop_bound == plain.flop_bound
    assert "periodic by a halo: a grid of [40, 56], q, k and v copied" in str(circle)


@needs_kernels
@pytest.mark.parametrize("size,windows", GRIDS, ids=str)
@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize("deterministic", [False, True])
def test_tiles_are_those_of_the_definition(size: Any, windows: Any, dim: int, deterministic: bool) -> None:
    window, stride, dilation, causal = (list(values) for values in zip(*windows, strict=True))
    torch.use_deterministic_algorithms(deterministic)
    plan = ask(meta(2, *size, 3, dim), window, stride=stride, dilation=dilation, is_causal=causal)
    steps = [s for p in (plan.forward, plan.backward) for s in p.steps if s.visited]
    assert [s.kernel for s in steps] == ["fwd_sm90", "bwd_sm90"] + ["bwd_dq_sm90"] * deterministic
    for step in steps:
        queries_stay = step.kernel != "bwd_sm90"
        staying, moving = (step.q_tile, step.kv_tile) if queries_stay else (step.kv_tile, step.q_tile)
        visited = full = 1
        for length, parameters, stay, move in zip(size, windows, staying, moving, strict=True):
            along = tiles_along(length, parameters, stay, move, queries_stay)
            visited, full = visited * along[0], full * along[1]
        # A box that does not fill its block is masked everywhere.
        filled = torch.Size(moving).numel() == block(step)
        assert (step.visited, step.full) == (visited, full if filled else 0), step


def block(step: Any) -> int:
    """Size of the moving block, from tiles.h."""
    wide = torch.Size(step.kv_tile).numel() > 128
    blocks = {("fwd_sm90", 64): 192 if wide else 128, ("fwd_sm90", 256): 80, ("bwd_sm90", 64): 128}
    return blocks.get((step.kernel, step.head_dim), 64)


@pytest.mark.parametrize("architecture", ["cpu", "sm_90"])
def test_flop_bound_counts_visible_pairs(architecture: str) -> None:
    size, windows = (12, 15), ((4, 5), (2, 1), (2, 3), (False, True))
    mask = neighborhood_mask(size, *windows)
    q, extra = meta(1, *size, 2, 64), meta(1, 7, 2, 64)
    window, stride, dilation, causal = windows
    plan = ask(
        q, window, stride=stride, dilation=dilation, is_causal=causal,
        additional_keys=extra, additional_values=extra, architecture=architecture,
    )  # fmt: skip
    n = mask.shape[0]
    assert plan.flop_bound == pytest.approx(n * (n + 7) / (int(mask.sum()) + 7 * n))


@needs_kernels
def test_dense_attention_has_nothing_to_gain() -> None:
    plan = ask(meta(1, 1024, 2, 128), 1024)
    assert plan.flop_bound == plan.forward.tile_bound == plan.backward.tile_bound == 1.0
    assert plan.forward.full_share == plan.backward.full_share == 1.0
    assert plan.forward.launches == 1


@needs_kernels
def test_launches() -> None:
    # Steps of the copy engine end at 8 (2 on a line): beyond, every dilation group is a launch.
    for dilation, groups in ((8, 1), (9, 81), ((9, 1), 9), ((10, 3), 10)):
        plan = ask(meta(1, 40, 50, 2, 64), 3, dilation=dilation)
        assert plan.forward.launches == groups
        assert plan.backward.launches == 1 + 3 * groups
    assert ask(meta(1, 60, 2, 64), 3, dilation=3).forward.launches == 3
    # A 3-D problem with padded head dims runs batch entry by batch entry.
    assert ask(meta(5, 9, 9, 9, 2, 72), 3).forward.launches == 5
    assert ask(meta(5, 9, 9, 9, 2, 64), 3).forward.launches == 1


@needs_kernels
def test_additional_tokens_are_further_tiles() -> None:
    q, extra = meta(1, 32, 32, 2, 128), meta(1, 130, 2, 128)
    alone, both = ask(q, 9), ask(q, 9, additional_keys=extra, additional_values=extra)
    q_tiles = -(-32 // alone.forward.steps[0].q_tile[0]) * -(-32 // alone.forward.steps[0].q_tile[1])
    assert both.forward.steps[0].visited == alone.forward.steps[0].visited + 2 * q_tiles
    assert both.forward.steps[0].full == alone.forward.steps[0].full + q_tiles
    extra_step = next(s for s in both.backward.steps if s.additional)
    assert extra_step.kv_tile == (128,)
    assert extra_step.visited == 2 * 16


@needs_kernels
def test_the_wide_tile_is_taken_where_it_is_cheaper() -> None:
    tiles = [ask(meta(1, 4096, 2, 64), window).forward.steps[0].kv_tile for window in (128, 4096)]
    assert tiles == [(128,), (192,)]
    assert ask(meta(1, 8192, 2, 64), 4096, dilation=2).forward.steps[0].kv_tile == (128,)


@needs_kernels
@pytest.mark.parametrize("dim,compiled", [(8, 32), (32, 32), (40, 64), (128, 128), (136, 256), (256, 256)])
def test_head_dim_is_the_next_that_is_compiled(dim: int, compiled: int) -> None:
    plan = ask(meta(1, 99, 2, dim), 9)
    assert {s.head_dim for s in (*plan.forward.steps, *plan.backward.steps) if s.visited} == {compiled}


@needs_kernels
def test_heads_with_equal_windows_are_one_launch() -> None:
    def launches(*windows: int) -> list[tuple[int, int]]:
        plan = ask(meta(1, 99, len(windows), 64), tuple((w,) for w in windows))
        return [(step.heads, step.launches) for step in plan.forward.steps]

    assert launches(3, 3, 3) == [(3, 1)]
    assert launches(3, 9, 3, 9) == [(2, 1), (2, 1)]  # evenly spaced
    assert launches(3, 9, 9, 3, 3) == [(1, 1), (2, 1), (2, 1)]  # unevenly: runs of neighbors
    mixed = ask(meta(1, 100, 2, 64), ((5,), (100,)))
    assert mixed.flop_bound == pytest.approx(2 * 100 * 100 / (100 * 5 + 100 * 100))


@needs_kernels
def test_workspace() -> None:
    rows, dim = 3 * 20 * 30 * 4, 64
    statistics, counter = 8 * rows, 4
    assert ask(meta(3, 20, 30, 4, dim), 5).backward.workspace_bytes == 4 * rows * dim + statistics + counter
    torch.use_deterministic_algorithms(True)
    assert ask(meta(3, 20, 30, 4, dim), 5).backward.workspace_bytes == statistics + counter


@pytest.mark.parametrize(
    "q,architecture,words",
    [
        (meta(1, 50, 2, 64), "sm_75", "compute capability 7.5"),
        (meta(1, 50, 2, 64, dtype=torch.float64), "sm_90", "bfloat16, float16, float32"),
        (meta(1, 50, 2, 264), "sm_90", "up to 256"),
    ],
)  # fmt: skip
@needs_kernels
def test_refusals_say_why(q: Tensor, architecture: str, words: str) -> None:
    plan = ask(q, 5, architecture=architecture)
    for name, refused in (("gna_fwd", plan.forward), ("gna_bwd", plan.backward)):
        assert refused.refused.startswith(f"{name}: ")
        assert words in refused.refused
        assert refused.launches == 0
    assert "refused: gna_fwd" in str(plan)


@needs_kernels
@pytest.mark.parametrize(
    "q,because",
    [
        (meta(1, 50, 2, 64, dtype=torch.float32), "bfloat16, float16"),
        (meta(1, 50, 2, 60), "multiples of 8"),
    ],
)
def test_portable_kernels_serve_what_hoppers_own_do_not(q: Tensor, because: str) -> None:
    plan, extra = ask(q, 5), q[:, :9]
    assert because in plan.forward.because
    assert because in plan.backward.because
    assert "portable kernels: " in str(plan)
    assert [s.kernel for s in plan.forward.steps] == ["fwd_sm80"]
    assert [s.kernel for s in plan.backward.steps if s.visited] == ["bwd_dkv_sm80", "bwd_dq_sm80"]
    assert ask(q, 5, backend="portable").forward.because is None
    assert "was asked for, but" in ask(q, 5, backend="hopper").forward.refused
    # The additional tokens stay in a launch of their own.
    plan = ask(q, 5, additional_keys=extra, additional_values=extra)
    assert sum(s.additional for s in plan.backward.steps) == 1


@needs_kernels
def test_portable_kernels_need_one_launch_for_any_dilation() -> None:
    q = meta(1, 40, 50, 2, 64)
    plan = ask(q, 3, dilation=9, backend="portable")
    assert (plan.forward.launches, plan.backward.launches) == (1, 3)
    assert plan.backward.workspace_bytes == 40 * 50 * 2 * 8 + 4
    assert ask(q, 3, backend="portable").forward.steps[0].visited > 0
    # Tiles are counted over all groups: at least one per group and query tile.
    assert plan.forward.steps[0].visited >= 81


def test_a_build_without_kernels_says_so() -> None:
    plan = ask(meta(1, 50, 2, 64), 5)
    assert ("built without CUDA kernels" in (plan.forward.refused or "")) == (
        "cuda" not in devices_with_kernel("gna_fwd")
    )


@pytest.mark.parametrize("architecture", ["cpu", pytest.param("sm_90", marks=needs_kernels)])
def test_copies_are_named(architecture: str) -> None:
    q, k, v = (
        meta(1, 20, 3, 64, 2).transpose(-1, -2),
        meta(1, 20, 3, 2, 64)[:, :, 1:2],
        meta(1, 20, 1, 2, 64),
    )
    k, v = k.reshape(1, 20, 1, 2, 64), v
    plan = explain(neighborhood_attention, q[:, :, 1:2], k, v, (3, 1), architecture=architecture)
    assert plan.forward.copies == plan.backward.copies == ("q",)
    assert "copies q" in str(plan)


def test_the_device_of_the_tensors_decides() -> None:
    q = torch.randn(1, 9, 2, 8)
    assert ask(q, 3, architecture=None).architecture == "cpu"
    with pytest.raises(ValueError, match="explain: name an architecture"):
        ask(meta(1, 9, 2, 8), 3, architecture=None)


@pytest.mark.parametrize("architecture", ["hopper", "sm90", "cuda"])
def test_unknown_architectures(architecture: str) -> None:
    with pytest.raises(ValueError, match=f"explain: architecture is '{architecture}'"):
        ask(meta(1, 9, 2, 8), 3, architecture=architecture)


def test_wrong_arguments_raise_as_in_the_call() -> None:
    with pytest.raises(ValueError, match="neighborhood_attention: the product of kernel_size"):
        ask(meta(1, 9, 2, 8), 10)
    with pytest.raises(
        NotImplementedError,
        match="explain: delta_rule_step cannot be explained; supported: delta_rule, local",
    ):
        explain(delta_rule_step, meta(1, 9, 2, 8))


@pytest.mark.skipif("cuda" not in devices_with_kernel("delta_fwd"), reason="this build has no CUDA kernels")
@pytest.mark.parametrize(
    "K,V,dtype,architecture,forward,backward",
    [
        (128, 128, torch.bfloat16, "sm_90", "hopper", "hopper"),
        (128, 256, torch.bfloat16, "sm_90", "hopper", "hopper"),
        (128, 264, torch.bfloat16, "sm_90", "hopper", "portable"),
        (60, 64, torch.float16, "sm_90", "portable", "portable"),
        (64, 64, torch.float32, "sm_90", "portable", "portable"),
        (300, 64, torch.bfloat16, "sm_90", None, None),
        (64, 64, torch.float64, "sm_90", None, None),
        (64, 64, torch.float64, "cpu", "cpu", "cpu"),
    ],
)
def test_delta_rule_names_its_backend(
    K: int, V: int, dtype: torch.dtype, architecture: str, forward: str | None, backward: str | None
) -> None:
    q, v, beta = (meta(1, 9, 2, *d, dtype=dtype) for d in ([K], [V], []))
    told = explain(delta_rule, q, q, v, beta, architecture=architecture)
    assert isinstance(told, delta.DeltaExplanation)
    for name, found in ((forward, told.forward), (backward, told.backward)):
        assert found.backend == name
        assert (found.because is not None) == (name == "portable")
        assert (found.refused is not None) == (name is None)
    assert ("portable kernels: " in str(told)) == ("portable" in (forward, backward))
    if backward == "hopper":
        again = explain(delta_rule, q, q, v, beta, architecture=architecture, recompute=True)
        assert again.backward.kernels == ("prepare_sm90", "state_pass_sm90", *told.backward.kernels)
    if architecture == "sm_90" and dtype != torch.float64 and K <= 256:
        named = explain(delta_rule, q, q, v, beta, architecture=architecture, backend="portable")
        assert named.forward == Pass("portable", ("prepare_sm80", "walk_sm80"))


@pytest.mark.skipif("cuda" not in devices_with_kernel("delta_fwd"), reason="this build has no CUDA kernels")
@pytest.mark.parametrize("T,H,V,gate,packed,kernels,plan", [
    (8192, 16, 128, 3, False, ["head_cluster"], "a cluster of four thread blocks per head"),
    (8192, 16, 72, None, False, ["head_cluster"], "a cluster of four thread blocks per head"),
    (32768, 32, 128, 3, False, ["head_cluster", "prepare", "state_pass", "compose_spans", "state_pass"],
     "per head; beside them 2 more on 12 multiprocessors, split into spans of 10944 tokens"),
    (32768, 36, 128, 3, False, ["head_cluster"], "29 of 65 begin where another has ended"),
    (8192, 16, 64, 3, False, ["prepare", "state_pass", "compose_spans", "state_pass"], "spans of 2048 tokens"),
    (8192, 16, 128, 4, False, ["prepare", "state_pass"], "100 multiprocessors prepare chunks beside the walk"),
    (8192, 8, 128, 4, False, ["prepare", "state_pass", "compose_spans", "state_pass"], "spans of 2048 tokens"),
    (8192, 50, 128, 4, False, ["prepare", "state_pass"], "chunks prepared before the walk"),
    (8192, 16, 128, 3, True, ["prepare", "state_pass"], "before the walk, which computes P"),
    (4096, 64, 128, 3, False, ["prepare", "state_pass"], "before the walk, which computes P"),
])  # fmt: skip
def test_delta_rule_tells_how_hopper_divides_the_work(
    T: int, H: int, V: int, gate: int | None, packed: bool, kernels: list[str], plan: str
) -> None:
    q, v = (meta(1, T, H, d) for d in (128, V))
    g = None if gate is None else meta(1, T, H, *([128] if gate == 4 else []))
    bounds = torch.arange(0, T + 1, T // 64) if packed else None
    told = explain(delta_rule, q, q, v, meta(1, T, H), g, cu_seqlens=bounds, architecture="sm_90")
    assert isinstance(told, delta.DeltaExplanation)
    assert told.forward.kernels == tuple(f"{kernel}_sm90" for kernel in kernels)
    assert told.forward.plan is not None
    assert plan in told.forward.plan
    assert f"on an H100: {told.forward.plan}" in str(told)
    assert told.backward.plan is None


@pytest.mark.skipif("cuda" not in devices_with_kernel("delta_fwd"), reason="this build has no CUDA kernels")
@pytest.mark.parametrize("differentiated", ["q", "initial_state"])
def test_delta_rule_tells_the_plan_of_a_forward_that_keeps(differentiated: str) -> None:
    q, beta = meta(1, 4096, 64, 128), meta(1, 4096, 64)
    initial_state = meta(1, 64, 128, 128, dtype=torch.float32)
    {"q": q, "initial_state": initial_state}[differentiated].requires_grad_()

    def plan(**options: bool) -> str | None:
        told = explain(
            delta_rule, q, q, q, beta, initial_state=initial_state, architecture="sm_90", **options
        )
        assert isinstance(told, delta.DeltaExplanation)
        return told.forward.plan

    assert plan() == "a cluster of four thread blocks per head, 29 heads cut in two for clusters that go on"
    assert plan(recompute=True) == "chunks prepared before the walk, which computes P"
    with torch.no_grad():
        assert plan() == "chunks prepared before the walk, which computes P"


def test_cpu_tiles_hold_a_register() -> None:
    for dtype, lanes in ((torch.float32, 16), (torch.float64, 8), (torch.bfloat16, 16)):
        plan = ask(meta(2, 20, 30, 4, 16, dtype=dtype), 7, architecture="cpu")
        shapes = [s.q_tile or s.kv_tile for s in (*plan.forward.steps, *plan.backward.steps)]
        assert all(torch.Size(shape).numel() <= lanes for shape in shapes)
        assert plan.forward.workspace_bytes == 0
        assert plan.backward.workspace_bytes == 2 * 20 * 30 * 4 * (8 if dtype == torch.float64 else 4)


@needs_kernels
def test_text_holds_what_matters() -> None:
    text = str(ask(meta(1, 30, 48, 80, 24, 128), (18, 24, 24), stride=(16, 8, 8)))
    words = ["sm_90", "[1, 30, 48, 80, 24, 128]", "bfloat16", "11.11", "fwd_sm90", "bwd_sm90", "GB", "100%"]
    assert all(word in text for word in words), text


def test_explaining_allocates_nothing_large() -> None:
    q = meta(16, 4096, 4096, 32, 128)  # 2^40 elements: only a shape
    for architecture in ("cpu", "sm_90"):
        assert ask(q, 7, architecture=architecture).flop_bound == pytest.approx(4096**2 / 49)


def test_local_linear_attention_on_the_cpu() -> None:
    q = torch.randn(1, 9, 2, 8)
    told = explain(local_linear_attention, q, q, q, lam=1.0)
    assert (told.backend, told.architecture) == ("cpu", "cpu")
    with pytest.raises(ValueError, match="local_linear_attention: backend is 'portable', but q is on cpu"):
        local_linear_attention(q, q, q, lam=1.0, backend="portable")
    with pytest.raises(ValueError, match="probe_attention: backend is 'fast', expected one of"):
        probe_attention(q, q, q, q, backend="fast")


@pytest.mark.skipif(
    "cuda" not in devices_with_kernel("lla_fwd"), reason="this build has no CUDA kernels: nothing to plan"
)
def test_local_linear_attention_falls_back_where_hopper_refuses() -> None:
    def told(dim: int, dtype: torch.dtype, **kwargs: Any) -> Any:
        q = meta(1, 9, 2, dim, dtype=dtype)
        return explain(local_linear_attention, q, q, q, lam=1.0, architecture="sm_90", **kwargs)

    assert told(64, torch.bfloat16).backend == "hopper"
    assert told(64, torch.bfloat16, backend="portable").because is None
    for dim, dtype, reason in ((60, torch.bfloat16, "multiples of 8"), (64, torch.float32, "dtype Float")):
        fallen = told(dim, dtype)
        assert (fallen.backend, fallen.head_dim) == ("portable", 64)
        assert reason in fallen.because
        assert reason in told(dim, dtype, backend="hopper").refused
    assert "up to 128" in told(129, torch.bfloat16).refused


@pytest.mark.skipif(
    "cuda" not in devices_with_kernel("lla_fwd"), reason="this build has no CUDA kernels: nothing to plan"
)
@pytest.mark.parametrize("backend", [None, "hopper", "portable"])
def test_local_linear_neighborhoods_have_kernels_of_hopper(backend: str | None) -> None:
    q = meta(1, 9, 8, 2, 64, dtype=torch.bfloat16)
    told = explain(
        neighborhood_local_linear_attention, q, q, q, 3, lam=1.0, architecture="sm_90", backend=backend
    )
    assert (told.backend, told.because) == (backend or "hopper", None)
    assert told.weights == (None if backend == "portable" else "kept")


def most_tiles_seen(mask: Tensor) -> int:
    """Tiles of 64 keys that lie between the first and the last that a tile of 64 queries sees."""
    most = 0
    for rows in mask.split(64):
        keys = rows.any(0).nonzero()[:, 0]
        if len(keys):
            most = max(most, int(keys[-1]) // 64 - int(keys[0]) // 64 + 1)
    return most


@pytest.mark.skipif(
    "cuda" not in devices_with_kernel("lla_fwd"), reason="this build has no CUDA kernels: nothing to plan"
)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    "m, n", [(1500, 1500), (1024, 1024), (700, 1490), (1490, 900), (3, 1300), (570, 570)]
)
def test_weights_are_kept_where_tiles_of_queries_see_few_keys(m: int, n: int, is_causal: bool) -> None:
    told = set()
    for window in (None, 1, 64, 256, 449, 450, 500, 512, 513, 514, 515, 543, 576, 577, 640):
        q, k = meta(1, m, 2, 64), meta(1, n, 2, 64)
        options = {"window": window, "is_causal": is_causal}
        weights = explain(local_linear_attention, q, k, k, lam=1.0, architecture="sm_90", **options).weights
        most = most_tiles_seen(lla_reference.visible_keys(m, n, **options))
        told.add(weights)
        assert weights == ("kept" if most <= 9 else "recomputed"), (window, most)
    assert told == ({"kept"} if n <= 576 else {"kept", "recomputed"})
    assert explain(probe_attention, q, q, k, k, architecture="sm_90").weights is None


@pytest.mark.skipif(
    "cuda" not in devices_with_kernel("lla_fwd"), reason="this build has no CUDA kernels: nothing to plan"
)
@pytest.mark.parametrize("is_causal, most", [(True, 513), (False, 257)])
def test_kept_weights_of_packed_sequences_fit_wherever_they_begin(is_causal: bool, most: int) -> None:
    q = meta(1, 3000, 2, 64)

    def weights(window: int | None) -> str:
        bounds = torch.tensor([0, 3000])
        return explain(
            local_linear_attention,
            q,
            q,
            q,
            lam=1.0,
            cu_seqlens=bounds,
            window=window,
            is_causal=is_causal,
            architecture="sm_90",
        ).weights

    assert [weights(w) for w in (1, most, most + 1, None)] == ["kept", "kept", "recomputed", "recomputed"]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        cuts = torch.randint(0, 3001, (12,), generator=generator).sort()[0]
        bounds = torch.cat([torch.tensor([0]), cuts])
        mask = lla_reference.visible_keys(3000, 3000, is_causal=is_causal, window=most, cu_seqlens=bounds)
        assert most_tiles_seen(mask) <= 9


@pytest.mark.skipif(
    "cuda" not in devices_with_kernel("lla_fwd"), reason="this build has no CUDA kernels: nothing to plan"
)
@pytest.mark.parametrize(
    "size, window, kept",
    [
        ((128, 128), (13, 13), True),
        ((128, 128), (17, 17), True),
        ((128, 128), (18, 18), False),
        ((16, 32, 32), (5, 5, 5), True),
        ((16, 32, 32), (5, 7, 7), False),
        ((24, 24), (24, 24), True),
        ((25, 24), (25, 24), False),
    ],
)
def test_weights_are_kept_where_boxes_see_few_boxes(size: Any, window: Any, kept: bool) -> None:
    q = meta(1, *size, 2, 64)
    told = explain(neighborhood_local_linear_attention, q, q, q, window, lam=1.0, architecture="sm_90")
    assert told.weights == ("kept" if kept else "recomputed")
    wide = meta(1, *size, 2, 128)
    told = explain(
        neighborhood_local_linear_attention, wide, wide, wide, window, lam=1.0, architecture="sm_90"
    )
    assert told.weights == "recomputed"
