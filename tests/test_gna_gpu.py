"""Neighborhood attention on CUDA: every kernel against the float64 definition."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from compare import assert_accurate
from nearfield import neighborhood_attention
from test_gna import PER_HEAD, Case, per_head_inputs, run_head_by_head, run_per_head, run_with_grads
from torch import Tensor

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16]


def cuda_inputs(case: Case, dtype: torch.dtype) -> list[Tensor]:
    return [t.detach().cuda().requires_grad_() for t in case.inputs(dtype)]


def check(case: Case, dtype: torch.dtype, inputs: list[Tensor] | None = None) -> None:
    inputs = cuda_inputs(case, dtype) if inputs is None else inputs
    wide = [t.detach().double().requires_grad_() for t in inputs]
    dout = torch.randn(*inputs[0].shape[:-1], case.dim_v, device="cuda").to(dtype)
    dlse = torch.randn(inputs[0].shape[:-1], device="cuda").to(dtype)
    got = run_with_grads(case.run, inputs, [dout, dlse])
    truth = run_with_grads(case.reference, wide, [dout, dlse])
    eager = run_with_grads(case.reference, inputs, [dout, dlse])
    names = ("out", "lse", "dq", "dk", "dv", "dadditional_k", "dadditional_v")
    for name, g, t, e in zip(names, got, truth, eager, strict=False):
        # lse is a float32 result of exact 16-bit inputs: hold it to the error of float32 arithmetic.
        if name == "lse":
            e = case.reference([i.detach().float() for i in inputs])[1]
        # The logarithm makes an absolute error of the sum's relative one, and that is a few units of ex2.approx.
        extra = {"factor": 8.0, "scale": 8.0} if name == "lse" else {}
        assert_accurate(f"{name} of {case} in {dtype}", g, t, e, **extra)


CASES = [
    Case((1,), (1,), dim=64, label="one-token"),
    Case((129,), (7,), dim=32, heads=3, batch=2),
    Case((1000,), (300,), dim=128),
    Case((1000,), (301,), (13,), causal=(True,), dim=128, heads=2),
    Case((640,), (256,), (128,), dim=64, label="strided"),
    Case((777,), (33,), (5,), (7,), (True,), dim=64, heads=4, heads_kv=2),
    Case((511,), (11,), (2,), (23,), dim=64, label="dilation-beyond-the-engine"),
    Case((33, 47), (7, 9), dim=64, heads=4, heads_kv=1, batch=2, label="gqa"),
    Case((40, 40), (40, 40), dim=128, label="dense"),
    Case((32, 32), (13, 13), (1, 2), (2, 1), dim=32),
    Case((29, 31), (5, 4), (2, 3), (3, 5), (False, True), dim=256, heads=1),
    Case((31, 30), (6, 5), (1, 1), (5, 6), dim=96, dim_v=40, heads=2, batch=2, label="odd-head-dims"),
    Case((56, 56), (7, 7), dim=32, heads=4, batch=2, label="nat"),
    Case((12, 17, 15), (5, 7, 9), dim=128, heads=2),
    Case((12, 17, 15), (12, 7, 9), (1, 4, 3), causal=(True, False, False), dim=128, heads=2, label="video"),
    Case((10, 12, 14), (10, 12, 14), causal=(True, False, False), dim=64, heads=1, label="frame-causal"),
    Case((9, 11, 13), (3, 3, 4), (2, 1, 2), (2, 3, 1), (True, False, True), dim=64, heads=2, heads_kv=1, batch=2),
    Case((8, 10, 12), (4, 5, 6), dim=80, dim_v=72, heads=2, batch=3, label="batch-by-batch"),
    Case((1, 24, 30), (1, 9, 5), dim=128, heads=2, label="single-frame"),
    Case((30, 30), (9, 9), additional=77, dim=128, heads=4, heads_kv=2, label="additional"),
    Case((31, 29), (5, 6), (1, 2), (3, 4), additional=130, dim=64, heads=2, label="additional-dilated"),
    Case((11, 12, 13), (3, 5, 5), additional=70, dim=72, heads=2, batch=2, label="additional-batch-by-batch"),
    Case((257,), (9,), dilation=(5,), additional=9, dim=128, heads=2, label="additional-per-group"),
    Case((300,), (64,), additional=256, dim=64, heads=2, batch=2, label="additional-whole-tiles"),
    Case((500,), (200,), (3,), causal=(True,), dim=256, heads=4, heads_kv=2, batch=2, label="256-gqa"),
    Case((20, 20), (20, 20), dim=256, heads=1, label="256-dense"),
    Case((30, 31), (9, 8), additional=77, dim=192, dim_v=256, heads=2, label="192-additional"),
    Case((9, 10, 12), (5, 5, 6), (1, 2, 3), dim=136, dim_v=248, heads=2, batch=2, label="136-batch-by-batch"),
    Case((20, 22), (5, 5), scale=-0.7, dim=64, label="negative-scale"),
    Case((20, 22), (5, 5), scale=0.0, dim=64, label="scale-0"),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_deterministic_mode(case: Case) -> None:
    """The other way to dQ: right as well, and the same bits every time."""
    torch.use_deterministic_algorithms(True)
    try:
        inputs = cuda_inputs(case, torch.bfloat16)
        check(case, torch.bfloat16, inputs)
        grad = torch.randn(*inputs[0].shape[:-1], case.dim_v, device="cuda", dtype=torch.bfloat16)
        first = torch.autograd.grad(case.run(inputs)[0], inputs, grad)
        for _ in range(4):
            again = torch.autograd.grad(case.run(inputs)[0], inputs, grad)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize("problem", PER_HEAD, ids=str)
def test_windows_per_head(problem: tuple[Any, ...], dim: int, deterministic: bool) -> None:
    torch.use_deterministic_algorithms(deterministic)
    try:
        cpu = per_head_inputs(problem, 70, torch.bfloat16, dim)
        inputs = [t.detach().cuda().requires_grad_() for t in cpu]
        wide = [t.detach().double().requires_grad_() for t in inputs]
        grads = [torch.randn_like(t).bfloat16() for t in run_per_head(problem, inputs)]
        got = run_with_grads(lambda t: run_per_head(problem, t), inputs, grads)
        truth = run_with_grads(lambda t: run_head_by_head(problem, t), wide, grads)
        eager = run_with_grads(lambda t: run_head_by_head(problem, t), inputs, grads)
    finally:
        torch.use_deterministic_algorithms(False)
    single = run_head_by_head(problem, [t.detach().float() for t in inputs])[1]
    for i, (g, t, e) in enumerate(zip(got, truth, eager, strict=True)):
        extra = {"factor": 8.0, "scale": 8.0} if i == 1 else {}  # lse: see check()
        assert_accurate(f"result {i} of {problem}", g, t, single if i == 1 else e, **extra)


def random_case(rng: random.Random, rank: int) -> Case:
    size, window, stride, dilation, causal = [], [], [], [], []
    largest = {1: 900, 2: 34, 3: 11}[rank]
    for _ in range(rank):
        x = rng.randint(1, largest)
        d = rng.choice([1, 1, 1, 2, 3, rng.randint(1, x)])
        d = min(d, x)
        w = rng.choice([rng.randint(1, x // d), x // d])
        size.append(x)
        dilation.append(d)
        window.append(w)
        stride.append(rng.choice([1, w, rng.randint(1, w)]))
        causal.append(rng.random() < 0.3)
    heads_kv = rng.choice([1, 2])
    dim = rng.choice([32, 64, 128, 128, 256, 8 * rng.randint(1, 32)])
    return Case(
        tuple(size), tuple(window), tuple(stride), tuple(dilation), tuple(causal),
        batch=rng.choice([1, 1, 2]), heads=heads_kv * rng.choice([1, 2, 3]), heads_kv=heads_kv,
        dim=dim, dim_v=rng.choice([dim, dim, 8 * rng.randint(1, 32)]),
        additional=rng.choice([0, 0, 0, 1, rng.randint(1, 200)]),
    )  # fmt: skip


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_500_random_problems(rank: int) -> None:
    rng = random.Random(rank)
    for _ in range(500):
        case = random_case(rng, rank)
        check(case, rng.choice(DTYPES))


@pytest.mark.parametrize("kind", ["large-scores", "constant", "one-hot"])
def test_hostile_inputs(kind: str) -> None:
    case = Case((30, 40), (7, 9), dim=64, additional=5)
    inputs = cuda_inputs(case, torch.bfloat16)
    with torch.no_grad():
        if kind == "large-scores":
            for t in inputs[:2]:
                t.mul_(30)
        elif kind == "constant":
            for t in inputs:
                t.fill_(1.5)
        elif kind == "one-hot":
            inputs[0].zero_()
            inputs[0][..., 0] = 1000
    check(case, torch.bfloat16, inputs)


def test_views_of_a_packed_projection() -> None:
    case = Case((24, 26), (7, 7), dim=64, heads=3)
    packed = torch.randn(2, 24, 26, 3, 3, 64, device="cuda", dtype=torch.bfloat16)
    for views in (packed.unbind(3), packed.unbind(4)):
        q, k, v = views
        got = neighborhood_attention(q, k, v, case.window)
        want = neighborhood_attention(q.contiguous(), k.contiguous(), v.contiguous(), case.window)
        assert torch.equal(got, want)
    heads_first = torch.randn(2, 3, 24, 26, 64, device="cuda", dtype=torch.bfloat16).permute(0, 2, 3, 1, 4)
    got = neighborhood_attention(heads_first, heads_first, heads_first, case.window)
    same = heads_first.contiguous()
    assert torch.equal(got, neighborhood_attention(same, same, same, case.window))


def test_offsets_beyond_32_bits() -> None:
    x, heads, dim = 1040, 8, 256
    q = torch.randn(1, x, x, heads, dim, device="cuda", dtype=torch.bfloat16)
    assert q.numel() > 2**31
    out = neighborhood_attention(q, q, q, 5)
    corner = q[:, -16:, -16:, -1:].contiguous()
    assert_accurate(
        "last corner",
        out[:, -8:, -8:, -1:],
        neighborhood_attention(corner.double().cpu(), corner.double().cpu(), corner.double().cpu(), 5)[
            :, -8:, -8:
        ],
        neighborhood_attention(corner.cpu(), corner.cpu(), corner.cpu(), 5)[:, -8:, -8:],
    )


def test_side_stream_and_graph() -> None:
    q, k, v = (torch.randn(1, 64, 64, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    want = neighborhood_attention(q, k, v, 13)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        got = neighborhood_attention(q, k, v, 13)
        assert not stream.query(), "the launch waited for the stream"
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = neighborhood_attention(q, k, v, 13)
    for _ in range(3):
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, want)


def test_bitwise_repeatable() -> None:
    case = Case((20, 24, 18), (7, 9, 5), dim=128, heads=2, batch=1)
    inputs = cuda_inputs(case, torch.bfloat16)
    first = case.run(inputs)
    for _ in range(5):
        for a, b in zip(first, case.run(inputs), strict=True):
            assert torch.equal(a, b)


def test_compile_and_opcheck() -> None:
    case = Case((30, 31), (7, 8), dim=64, heads=2, additional=9)
    inputs = cuda_inputs(case, torch.bfloat16)

    def f(*tensors: Tensor) -> Any:
        return case.run(list(tensors))[0]

    grad = torch.randn_like(f(*inputs))
    want = [f(*inputs), *torch.autograd.grad(f(*inputs), inputs, grad)]
    compiled = torch.compile(f, fullgraph=True)
    got = [compiled(*inputs), *torch.autograd.grad(compiled(*inputs), inputs, grad)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
    torch.library.opcheck(
        torch.ops.nearfield.gna_fwd.default,
        (*inputs, [7, 8], [1, 1], [1, 1], [0, 0], 0.125),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        atol=1e-2, rtol=1e-2,
    )  # fmt: skip


@pytest.mark.parametrize(
    "dtype, dim, words",
    [
        (torch.float32, 64, "float16"),
        (torch.bfloat16, 60, "multiples of 8"),
        (torch.bfloat16, 264, "multiples of 8"),
    ],
)
def test_what_is_not_built_is_refused(dtype: torch.dtype, dim: int, words: str) -> None:
    q = torch.randn(1, 9, 9, 1, dim, device="cuda", dtype=dtype)
    with pytest.raises((NotImplementedError, RuntimeError), match=words):
        neighborhood_attention(q, q, q, 3)
