"""8-bit neighborhood attention on Hopper, against the float64 definition of what the inputs stand for."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from gna_cases import Case
from gna_fp8_cases import CHECKS, FP8, Inputs, check, inputs, run
from nearfield import neighborhood_attention
from torch import Tensor

pytestmark = pytest.mark.gpu

CASES = [
    Case((1,), (1,), dim=64, label="one-token"),
    Case((129,), (7,), dim=32, heads=3, batch=2),
    Case((1000,), (300,), dim=128),
    Case((1000,), (301,), (13,), causal=(True,), dim=128, heads=2),
    Case((640,), (256,), (128,), dim=64, label="strided"),
    Case((777,), (33,), (5,), (7,), (True,), dim=64, heads=4, heads_kv=2),
    Case((511,), (11,), (2,), (23,), dim=64, label="dilation-beyond-the-engine"),
    Case((33, 47), (7, 9), dim=64, heads=4, heads_kv=1, batch=2, label="gqa"),
    Case((33, 47), (7, 9), dim=128, heads=6, heads_kv=2, batch=2, label="gqa"),
    Case((40, 40), (40, 40), dim=128, label="dense"),
    Case((40, 40), (40, 40), dim=64, label="dense"),
    Case((32, 32), (13, 13), (1, 2), (2, 1), dim=32),
    Case((29, 31), (5, 4), (2, 3), (3, 5), (False, True), dim=128, heads=1),
    Case((31, 30), (6, 5), (1, 1), (5, 6), dim=96, dim_v=48, heads=2, batch=2, label="odd-head-dims"),
    Case((31, 30), (6, 5), dim=64, dim_v=128, heads=2, batch=2, label="wider-values"),
    Case((56, 56), (7, 7), dim=32, heads=4, batch=2, label="nat"),
    Case((12, 17, 15), (5, 7, 9), dim=128, heads=2),
    Case((12, 17, 15), (12, 7, 9), (1, 4, 3), causal=(True, False, False), dim=128, heads=2, label="video"),
    Case((10, 12, 14), (10, 12, 14), causal=(True, False, False), dim=64, heads=1, label="frame-causal"),
    Case((10, 12, 14), (10, 12, 14), causal=(True, False, False), dim=128, heads=2, label="frame-causal"),
    Case((9, 11, 13), (3, 3, 4), (2, 1, 2), (2, 3, 1), (True, False, True), dim=64, heads=2, heads_kv=1, batch=2),
    Case((8, 10, 12), (4, 5, 6), dim=80, dim_v=16, heads=2, batch=3, label="batch-by-batch"),
    Case((1, 24, 30), (1, 9, 5), dim=128, heads=2, label="single-frame"),
    Case((20, 22), (5, 5), scale=0.7, dim=64, label="scale"),
]  # fmt: skip


@pytest.mark.parametrize("scaled", [True, False], ids=["descaled", "plain"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case: Case, scaled: bool) -> None:
    check(case, inputs(case, "cuda", scaled=scaled))


def test_float16_output() -> None:
    case = Case((40, 41), (9, 13), dim=128, heads=4, heads_kv=2, batch=2)
    check(case, inputs(case, "cuda"), out_dtype=torch.float16, backend="hopper")


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_random_problems(rank: int) -> None:
    draw = random.Random(rank)
    for _ in range(40):
        longest = {1: 900, 2: 36, 3: 13}[rank]
        size = tuple(draw.randint(1, longest) for _ in range(rank))
        dilation = tuple(draw.randint(1, min(x, 3)) for x in size)
        window = tuple(draw.randint(1, x // d) for x, d in zip(size, dilation, strict=True))
        stride = tuple(draw.randint(1, w) for w in window)
        causal = tuple(draw.random() < 0.3 for _ in size)
        heads_kv = draw.randint(1, 3)
        case = Case(
            size, window, stride, dilation, causal, batch=draw.randint(1, 2), heads=heads_kv * draw.randint(1, 2),
            heads_kv=heads_kv, dim=draw.choice([64, 128, 48]), dim_v=draw.choice([64, 128, 0]),
        )  # fmt: skip
        check(case, inputs(case, "cuda", scaled=draw.random() < 0.8))


def test_integers_are_exact() -> None:
    """One key per query: P is 2^8 exactly, so the output is that value, wherever its tile puts it."""
    for size, dim in (((700,), 128), ((700,), 64), ((25, 33), 128), ((7, 9, 11), 64)):
        shape = (2, *size, 3, dim)
        v = torch.randint(-15, 16, shape).float().cuda().to(FP8)
        out = neighborhood_attention(v, v, v, 1)
        assert torch.equal(out, v.bfloat16())


def test_windows_per_head_take_their_own_factors() -> None:
    case = Case((30, 31), (5, 5), heads=4, dim=64, batch=2)
    given = inputs(case, "cuda")
    windows = [(5, 5), (9, 7), (5, 5), (9, 7)]
    got = neighborhood_attention(*given.tensors, windows, return_lse=True, **given.named)
    assert given.descales is not None
    for h, window in enumerate(windows):
        parts = [t[..., h : h + 1, :] for t in given.tensors]
        alone = Inputs(parts, [d[:, h : h + 1] for d in given.descales])
        want = neighborhood_attention(*alone.tensors, window, return_lse=True, **alone.named)
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g.narrow(3, h, 1), w)


def test_views_and_repeats_give_the_same_bits() -> None:
    case = Case((24, 26), (7, 9), heads=4, heads_kv=2, dim=128, batch=2)
    given = inputs(case, "cuda")
    want = run(case, given)
    q, k, v = given.tensors
    packed = torch.cat([t.view(torch.uint8) for t in (q, k, v)], -2).view(FP8)
    views = [packed[..., :4, :], packed[..., 4:6, :], packed[..., 6:, :]]
    crooked = [t.view(torch.uint8).repeat_interleave(2, -1).view(FP8)[..., ::2] for t in (q, k, v)]
    for tensors in (given.tensors, views, crooked, given.tensors):
        for g, w in zip(run(case, Inputs(tensors, given.descales)), want, strict=True):
            assert torch.equal(g, w)


def test_one_factor_for_all_heads_by_expansion() -> None:
    case = Case((300,), (40,), heads=4, dim=64, batch=2)
    given = inputs(case, "cuda", scaled=False)
    factors = [torch.full((1, 1), x, device="cuda") for x in (0.5, 2.0, 4.0)]
    got = run(case, Inputs(given.tensors, [f.expand(2, 4) for f in factors]))
    want = run(case, given)
    assert torch.equal(got[0], want[0] * 4)
    assert torch.equal(got[1], want[1])


def test_unseen_nan_stays_unseen() -> None:
    case = Case((64, 64), (7, 7), heads=2, dim=128)
    given = inputs(case, "cuda")
    want = run(case, given)[0]
    given.tensors[1].view(torch.uint8)[:, -1] = 0x7F
    got = run(case, given)[0]
    assert torch.equal(got[:, :50], want[:, :50])
    assert got[:, -1].isnan().all()


def test_large_scores_and_rows_far_below_the_first_tile() -> None:
    """Maxima that move by hundreds from tile to tile."""
    case = Case((1024,), (1024,), heads=2, dim=64)
    given = inputs(case, "cuda", scaled=False)
    grow = torch.linspace(0.1, 8, 1024)[None, :, None, None]
    given.tensors[1] = (given.tensors[1].float().cpu() * grow).to(FP8).cuda()
    check(case, given)


def step(q: Tensor, k: Tensor, v: Tensor, d: Tensor) -> Any:
    return neighborhood_attention(
        q, k, v, (5, 7), is_causal=(True, False), q_descale=d, k_descale=d, v_descale=d, return_lse=True
    )


def arguments() -> list[Tensor]:
    case = Case((20, 22), (5, 7), heads=4, heads_kv=2, dim=64, batch=2)
    given = inputs(case, "cuda")
    assert given.descales is not None
    return [*given.tensors, given.descales[0]]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    torch._dynamo.reset()
    args = arguments()
    for got, want in zip(
        torch.compile(step, fullgraph=True, backend=backend)(*args), step(*args), strict=True
    ):
        assert torch.equal(got, want)


def test_opcheck() -> None:
    q, k, v, d = arguments()
    windows = ([5, 7], [1, 1], [1, 1], [1, 0])
    torch.library.opcheck(
        torch.ops.nearfield.gna_fwd_8bit,
        (q, k, v, d, None, d, *windows, 0.125, torch.bfloat16),
        test_utils=CHECKS,
    )


def test_cuda_graph() -> None:
    args = arguments()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(*args)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(*args)
    for _ in range(2):
        new = arguments()
        for a, b in zip(args, new, strict=True):
            a.copy_(b)
        graph.replay()
        for g, w in zip(got, step(*new), strict=True):
            assert torch.equal(g, w)


@pytest.mark.parametrize(
    "dim, options, message",
    [
        (64, {"backend": "portable"}, "backend is given"),
        (256, {}, "multiples of 16 up to 128"),
        (72, {}, "multiples of 16 up to 128"),
    ],
)
def test_refusals(dim: int, options: dict[str, Any], message: str) -> None:
    q = torch.zeros(1, 40, 2, dim, device="cuda").to(FP8)
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        neighborhood_attention(q, q, q, 5, **options)
