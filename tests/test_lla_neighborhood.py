"""Local linear attention over neighborhoods of a grid against its definition: values, gradients, framework contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import nearfield
import pytest
import torch
from compare import assert_accurate
from lla_cases import CONVERGED, DTYPES, F64, dtype_id, with_gradients
from nearfield.lla import (
    local_linear_attention,
    neighborhood_local_linear_attention,
    neighborhood_probe_attention,
)
from nearfield.lla import reference as ref
from nearfield.lla.neighborhood import Boxes, boxes_of
from torch import Tensor

ops = torch.ops.nearfield


class Case(NamedTuple):
    size: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    dilation: tuple[int, ...] | None = None
    causal: tuple[bool, ...] | None = None
    B: int = 1
    Hq: int = 2
    Hk: int = 1
    d: int = 16
    dv: int = 24

    def __str__(self) -> str:
        text = "x".join(map(str, self.size)) + "-w" + "x".join(map(str, self.window))
        for name, value in (("s", self.stride), ("d", self.dilation), ("c", self.causal)):
            text += "" if value is None else f"-{name}" + "x".join(str(int(x)) for x in value)
        return text

    @property
    def windows(self) -> dict[str, Any]:
        ones = (1,) * len(self.size)
        return {
            "kernel_size": self.window,
            "stride": self.stride or ones,
            "dilation": self.dilation or ones,
            "is_causal": self.causal or (False,) * len(self.size),
        }


class Grid(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor

    def to(self, dtype: torch.dtype) -> Grid:
        return Grid(*(t.to(dtype) for t in self))


def draw(case: Case) -> Grid:
    shape = (case.B, *case.size)
    return Grid(
        *(
            torch.randn(*shape, *rest, dtype=F64)
            for rest in ((case.Hq, case.d), (case.Hk, case.d), (case.Hk, case.dv))
        )
    )


CASES = [
    Case((9, 11), (3, 5)),
    Case((9, 11), (9, 11)),  # the dense operator
    Case((7, 6), (1, 1)),  # one key: o is its value
    Case((5, 13), (1, 4)),
    Case((17, 19), (7, 7), causal=(True, False), B=2),
    Case((12, 10), (5, 4), causal=(True, True), Hk=2),
    Case((17, 13), (3, 3), dilation=(3, 2)),  # groups of two lengths
    Case((16, 16), (8, 6), stride=(4, 3)),
    Case((13, 11), (4, 5), stride=(2, 3), dilation=(2, 2), causal=(False, True)),
    Case((5, 6, 7), (3, 3, 3)),
    Case((4, 9, 5), (2, 5, 5), causal=(True, False, False), B=2, Hq=4, Hk=2),
    Case((6, 5, 7), (2, 1, 3), dilation=(2, 3, 1), stride=(1, 1, 2)),
    Case((1, 70), (1, 9)),
    Case((150,), (13,), dilation=(4,)),
    Case((1,), (1,), Hq=1),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)

LAMS: dict[str, Callable[[Case], Tensor]] = {
    "scalar": lambda c: torch.tensor(0.7, dtype=F64),
    "head": lambda c: 0.3 + torch.rand(c.Hq, dtype=F64),
    "channel": lambda c: 0.3 + torch.rand(c.Hq, c.d, dtype=F64),
    "token": lambda c: 0.3 + torch.rand(c.B, *c.size, c.Hq, dtype=F64),
}
NAMES = ("o", "dq", "dk", "dv", "dlam")


def check(case: Case, grid: Grid, lam: Tensor, dtype: torch.dtype, ridge: str = "relative") -> None:
    """Output and all gradients against the definition in float64 on the rounded inputs; the yardstick is a direct solve."""
    work = F64 if dtype == F64 else torch.float32
    rounded, lam = grid.to(dtype), lam.to(work)
    d_o = torch.randn(*grid.q.shape[:-1], case.dv, dtype=F64).to(dtype)
    options = {**case.windows, "ridge": ridge}

    def definition(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
        return ref.neighborhood_local_linear_attention(q, k, v, lam=lam, **options)[0]

    def operator(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
        return neighborhood_local_linear_attention(q, k, v, lam=lam, **options, **CONVERGED[dtype])

    exact, direct = rounded.to(F64), rounded.to(work)
    truth, unit = truth_and_unit(definition, exact, lam.to(F64), d_o)
    # An order of summation is a draw, and all of a few can be exact by luck on one BLAS or another.
    orders = [torch.arange(case.d), *(torch.randperm(case.d) for _ in range(11))]
    eager = [in_order(definition, direct, lam, d_o, order) for order in orders]
    got = with_gradients(operator, (*rounded, lam), d_o)
    terms = float(d_o.abs().max() * grid.v.abs().max() * grid.q.abs().max() * grid.k.abs().max())
    for name, g, t, e in zip(NAMES, got, truth, zip(*eager, strict=True), strict=True):
        cancels = name in ("dq", "dk", "dlam") and float(t.abs().max()) < 1e-12 * terms
        scale = terms if cancels else unit if name == "dlam" else 0.0
        assert_accurate(name, g, t, [x.to(g.dtype) for x in e], scale=scale)


def truth_and_unit(
    definition: Callable[..., Tensor], exact: Grid, lam: Tensor, d_o: Tensor
) -> tuple[list[Tensor], float]:
    """The gradient of a shared lam is a sum over rows that cancels: its unit is the sum of absolute values."""
    flat = exact.q.flatten(1, -3)
    per_token = lam.shape == exact.q.shape[:-1]
    rows = ref.ridge_per_row(lam.flatten(1, -2) if per_token else lam, flat)
    truth = with_gradients(definition, (*exact, rows), d_o)
    axes = (3,) if per_token else ((0, 1, 2, 3), (0, 1, 3), (0, 1))[lam.ndim]
    unit = float(truth[4].abs().sum(axes).max())
    truth[4] = truth[4].sum(axes).reshape(lam.shape)
    return truth, unit


def in_order(
    definition: Callable[..., Tensor], grid: Grid, lam: Tensor, d_o: Tensor, order: Tensor
) -> list[Tensor]:
    """The same with the features of q, k and a ridge per channel in another order, put back in the results."""
    per_channel = lam.ndim == 2
    inputs = (grid.q[..., order], grid.k[..., order], grid.v, lam[..., order] if per_channel else lam)
    o, dq, dk, dv, dlam = with_gradients(definition, inputs, d_o)
    back = order.argsort()
    return [o, dq[..., back], dk[..., back], dv, dlam[..., back] if per_channel else dlam]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@each_case
def test_matches_definition(case: Case, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check(case, draw(case), torch.tensor(0.5), dtype)


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=dtype_id)
@pytest.mark.parametrize("ridge", ["relative", "absolute"])
@pytest.mark.parametrize("mode", LAMS)
def test_every_ridge(mode: str, ridge: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    case = Case((10, 9), (3, 5), causal=(True, False), B=2)
    check(case, draw(case), LAMS[mode](case), dtype, ridge)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("hostile", ["offset", "equal-keys", "logits-1000"])
def test_hostile_inputs(hostile: str, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    case = Case((9, 11), (5, 3), causal=(False, True))
    q, k, v = draw(case)
    if hostile == "offset":
        k = k + 16
    elif hostile == "equal-keys":
        k = k[:, :1, :1].expand_as(k).clone()
    else:
        q = q * 250
    check(case, Grid(q, k, v), torch.tensor(1.0), dtype)


@each_case
def test_probe_matches_definition(case: Case) -> None:
    torch.manual_seed(3)
    q, k, v = draw(case)
    x = torch.randn_like(q)
    d_o = torch.randn(*q.shape[:-1], case.dv, dtype=F64)
    truth = with_gradients(lambda *t: ref.neighborhood_probe_attention(*t, **case.windows), (q, x, k, v), d_o)
    got = with_gradients(lambda *t: neighborhood_probe_attention(*t, **case.windows), (q, x, k, v), d_o)
    for name, g, t in zip(("o", "dq", "dx", "dk", "dv"), got, truth, strict=True):
        torch.testing.assert_close(g, t, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("mode", LAMS)
def test_gradcheck(mode: str) -> None:
    torch.manual_seed(4)
    case = Case((3, 2), (2, 2), causal=(True, False), d=3, dv=2)
    leaves = [t.requires_grad_() for t in (*draw(case), LAMS[mode](case))]
    options = {**case.windows, "tol": 0.0, "max_iters": 60}
    assert torch.autograd.gradcheck(
        lambda q, k, v, lam: neighborhood_local_linear_attention(q, k, v, lam=lam, **options), leaves
    )


def test_whole_grid_and_one_dimension_are_the_dense_operator() -> None:
    torch.manual_seed(5)
    q, k, v = draw(Case((8, 9), (8, 9)))
    flat = [t.flatten(1, 2) for t in (q, k, v)]
    want = local_linear_attention(*flat, lam=0.5, is_causal=False, tol=1e-12, max_iters=200)
    got = neighborhood_local_linear_attention(q, k, v, -1, lam=0.5, tol=1e-12, max_iters=200)
    torch.testing.assert_close(got.flatten(1, 2), want, rtol=1e-9, atol=1e-10)
    for causal in (False, True):
        options = {"lam": 0.5, "is_causal": causal, "tol": 1e-12, "max_iters": 200}
        want = local_linear_attention(*flat, window=9, **options)
        got = neighborhood_local_linear_attention(*flat, 9, **options)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_window_of_one_is_exact() -> None:
    torch.manual_seed(6)
    case = Case((6, 7), (1, 1))
    q, k, v = (t.float().requires_grad_() for t in draw(case))
    o = neighborhood_local_linear_attention(q, k, v, 1, lam=1e-3)
    assert torch.equal(o, v.expand_as(o))
    dq, dk, dv = torch.autograd.grad(o.sum(), (q, k, v))
    assert not dq.any()
    assert not dk.any()
    assert torch.equal(dv, torch.full_like(v, case.Hq))


def test_aux() -> None:
    torch.manual_seed(7)
    case = Case((10, 13), (5, 3), causal=(True, False), B=2)
    q, k, v = draw(case)
    _, info = neighborhood_local_linear_attention(q, k, v, lam=1.0, return_aux=True, **case.windows)
    _, lse = ref.neighborhood_local_linear_attention(q, k, v, lam=1.0, **case.windows)
    torch.testing.assert_close(info.lse, lse)
    assert info.iterations.shape == info.ratio.shape == lse.shape
    assert info.iterations.dtype == torch.int32
    assert int(info.iterations.max()) > 1
    assert float(info.ratio.max()) <= 1e-3


def test_strided_views() -> None:
    torch.manual_seed(8)
    packed = torch.randn(2, 12, 3, 4, 9, 8)  # [B, X_2, 3, H, X_1, D]
    q, k, v = (packed[:, :, i].permute(0, 3, 1, 2, 4) for i in range(3))
    options = {"lam": 1.0, "is_causal": (True, False)}
    got = neighborhood_local_linear_attention(q, k, v, (3, 5), **options)
    want = neighborhood_local_linear_attention(*(t.contiguous() for t in (q, k, v)), (3, 5), **options)
    assert torch.equal(got, want)


@pytest.mark.parametrize("box", [[8, 8], [1, 64], [64, 1], [4, 16]])
def test_any_box_gives_the_same(box: list[int]) -> None:
    boxes = Boxes([11, 14], [3, 4], [1, 2], [2, 1], [0, 1], box)
    t = torch.randn(2, 11, 14, 3, 5)
    assert torch.equal(boxes.restore(boxes.sort(t)), t)
    q, k, v = (torch.randn(2, 11, 14, 3, 5, dtype=F64) for _ in range(3))
    x = torch.randn_like(q)
    rows = (boxes.sort(z) for z in (q, x, k, v))
    o = ops.lla_probe_fwd(*rows, None, 1.0, False, None, None, boxes.grid)[0]
    options = {"kernel_size": [3, 4], "stride": [1, 2], "dilation": [2, 1], "is_causal": [False, True]}
    want = ref.neighborhood_probe_attention(q, x, k, v, scale=1.0, **options)
    torch.testing.assert_close(boxes.restore(o), want, rtol=1e-9, atol=1e-11)


def test_boxes_follow_the_window() -> None:
    def box(size: tuple[int, ...], window: Any) -> list[int]:
        t = torch.empty(1, *size, 1, 8, device="meta")
        return boxes_of("op", t, t, t, window, 1, 1, False).side

    assert box((16, 256, 256), (1, 7, 7))[0] == 1
    assert box((64, 64), (7, 7)) == [1, 64]  # whole rows: nothing to the left and right of them
    assert box((1, 4096), (1, 9)) == [1, 64]


Q = torch.randn(1, 6, 5, 2, 8)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"q": Q[0, 0]}, ValueError, "q has shape"),
        ({"k": Q[:, :5]}, ValueError, "k has shape"),
        ({"v": Q[:, :, :, :1]}, ValueError, "v has shape"),
        ({"k": Q[..., :4]}, ValueError, "k has shape"),
        ({"q": Q[:, :, :, :1]}, ValueError, "q has 1 heads"),
        ({"k": Q.double()}, ValueError, "k has dtype"),
        ({"kernel_size": (7, 3)}, ValueError, "kernel_size"),
        ({"kernel_size": (3, 3, 3)}, ValueError, "kernel_size"),
        ({"kernel_size": 0}, ValueError, "kernel_size"),
        ({"kernel_size": 2.0}, TypeError, "kernel_size"),
        ({"stride": (4, 1)}, ValueError, "stride"),
        ({"dilation": (1, 2)}, ValueError, "dilation"),
        ({"is_causal": 1}, TypeError, "is_causal"),
        ({"lam": -1.0}, ValueError, "lam is"),
        ({"lam": torch.ones(1, 6, 4, 2)}, ValueError, "lam has shape"),
        ({"lam": torch.ones(3)}, ValueError, "lam has shape"),
        ({"scale": float("nan")}, ValueError, "scale"),
        ({"tol": -1.0}, ValueError, "tol"),
        ({"max_iters": 0}, ValueError, "max_iters"),
        ({"ridge": "both"}, ValueError, "ridge"),
        ({"backend": "portable"}, ValueError, "backend"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"q": Q, "k": Q, "v": Q, "kernel_size": 3, "lam": 1.0}
    with pytest.raises(error, match=f"neighborhood_local_linear_attention: .*{message}"):
        neighborhood_local_linear_attention(**{**good, **changes})


def test_bad_probe() -> None:
    with pytest.raises(ValueError, match="neighborhood_probe_attention: x has shape"):
        neighborhood_probe_attention(Q, Q[..., :4], Q, Q, 3)


def test_direct_calls_are_checked_too() -> None:
    rows = torch.randn(1, 64, 1, 8)
    grid = [1, 6, 5, 1, 3, 3, 1, 1, 1, 1, 1, 1, 0, 0, 0, 1, 8, 8]

    def call(**changed: int) -> None:
        wrong = [changed.get(f"at{i}", x) for i, x in enumerate(grid)]
        ops.lla_probe_fwd(rows, rows, rows, rows, None, 1.0, False, None, None, wrong)

    call()
    wrongs = {"grid\\[1\\] is": {"at1": 0}, "hold its window": {"at4": 7}, "the box of": {"at17": 4}}
    wrongs |= {"q and k have 64": {"at1": 9}}
    for message, wrong in wrongs.items():
        with pytest.raises(RuntimeError, match=f"lla_probe_fwd: .*{message}"):
            call(**wrong)
    with pytest.raises(RuntimeError, match="grid has 3 entries"):
        ops.lla_probe_fwd(rows, rows, rows, rows, None, 1.0, False, None, None, [1, 2, 3])


def test_empty_batch() -> None:
    t = torch.randn(0, 6, 5, 2, 8, requires_grad=True)
    o = neighborhood_local_linear_attention(t, t, t, 3, lam=1.0)
    assert o.shape == t.shape
    o.sum().backward()


def test_opcheck() -> None:
    boxes = Boxes([6, 5], [3, 3], [1, 1], [1, 1], [0, 1], [8, 8])
    q, k, v, x = (boxes.sort(torch.randn(1, 6, 5, 2, 8)).detach().requires_grad_() for _ in range(4))
    lam = torch.full((1, 64, 2, 1), 0.5, requires_grad=True)
    mask = (None, 0.3, False, None)
    solver = (False, 1e-3, 8)
    torch.library.opcheck(ops.lla_fwd.default, (q, k, v, lam, *mask, *solver, None, boxes.grid))
    torch.library.opcheck(ops.lla_probe_fwd.default, (q, x, k, v, *mask, None, boxes.grid))


def module(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
    o = neighborhood_local_linear_attention(q, k, v, (3, 5), lam=lam, is_causal=(True, False))
    return neighborhood_probe_attention(q, o * 0.5, k, v, 3)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    torch._dynamo.reset()
    f = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in ((6, 7), (9, 8)) if dynamic else ((6, 7),):
        leaves = (*(torch.randn(1, *size, 2, 8) for _ in range(3)), torch.rand(1, *size, 2) + 0.3)
        d_o = torch.randn_like(leaves[0])
        for a, b in zip(with_gradients(f, leaves, d_o), with_gradients(module, leaves, d_o), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_autocast_and_meta() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert neighborhood_local_linear_attention(Q, Q, Q, 3, lam=1.0).dtype == torch.bfloat16
    meta = Q.to("meta")
    assert neighborhood_local_linear_attention(meta, meta, meta, 3, lam=1.0).shape == Q.shape


def test_explain() -> None:
    t = torch.empty(1, 12, 64, 64, 4, 64, dtype=torch.bfloat16, device="meta")
    told = nearfield.explain(
        neighborhood_local_linear_attention, t, t, t, (3, 7, 7), lam=1.0, architecture="cpu"
    )
    assert told.backend == "cpu"
    assert "kernel_size [3, 7, 7]" in str(told)
    told = nearfield.explain(neighborhood_probe_attention, t, t, t, t, 7, architecture="cpu")
    assert told.backend == "cpu"


def test_public_names() -> None:
    assert nearfield.neighborhood_local_linear_attention is neighborhood_local_linear_attention
    assert {"neighborhood_local_linear_attention", "neighborhood_probe_attention"} <= set(nearfield.__all__)
