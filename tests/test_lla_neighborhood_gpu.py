"""Local linear attention over neighborhoods of a grid on CUDA, against the float64 definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lla_cases import F64, dtype_id, with_gradients
from nearfield import explain
from nearfield.lla import (
    local_linear_attention,
    neighborhood_local_linear_attention,
    neighborhood_probe_attention,
)
from nearfield.lla import reference as ref
from test_lla_gpu import CONVERGED, assert_close, bound
from test_lla_neighborhood import CASES, LAMS, NAMES, Case, Grid, draw, truth_and_unit
from torch import Tensor

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LARGE = [  # the reference holds a covariance per pair
    Case((24, 28), (7, 7), d=64, dv=64, Hq=4, Hk=2),
    Case((19, 23), (13, 11), d=128, dv=128, B=2),
    Case((4, 12, 14), (3, 7, 5), d=64, dv=32, causal=(True, False, False)),
    Case((23, 25), (7, 5), dilation=(2, 3), stride=(2, 1), d=40, dv=72, causal=(False, True)),
]


def check(case: Case, lam: Tensor, dtype: torch.dtype, ridge: str = "relative", **solver: Any) -> None:
    grid = [t.cuda().to(dtype) for t in draw(case)]
    lam = lam.cuda().float()
    d_o = torch.randn(*grid[0].shape[:-1], case.dv, device="cuda").to(dtype)
    options = {**case.windows, "ridge": ridge}

    def definition(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
        return ref.neighborhood_local_linear_attention(q, k, v, lam=lam, **options)[0]

    def operator(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
        return neighborhood_local_linear_attention(q, k, v, lam=lam, **options, **{**CONVERGED, **solver})

    truth, unit = truth_and_unit(definition, Grid(*(t.to(F64) for t in grid)), lam.double(), d_o)
    got = with_gradients(operator, (*grid, lam), d_o)
    terms = float(d_o.abs().max() * grid[2].abs().max() * grid[0].abs().max() * grid[1].abs().max())
    for name, g, t in zip(NAMES, got, truth, strict=True):
        scale = {"dlam": max(unit, 1e-3 * terms), "dq": 1e-3 * terms, "dk": 1e-3 * terms}.get(name, 0.0)
        assert_close(name, g, t, bound(name, float(lam.min()), dtype), scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_matches_definition(case: Case, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check(case, torch.tensor(1.0), dtype)


@pytest.mark.parametrize("ridge", ["relative", "absolute"])
@pytest.mark.parametrize("mode", LAMS)
def test_every_ridge(mode: str, ridge: str) -> None:
    torch.manual_seed(1)
    case = Case((20, 19), (5, 7), causal=(True, False), B=2, d=32, dv=32)
    check(case, LAMS[mode](case) + 0.7, torch.bfloat16, ridge)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_probe_matches_definition(case: Case, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    q, k, v = (t.cuda().to(dtype) for t in draw(case))
    x = torch.randn(q.shape, device="cuda")
    d_o = torch.randn(*q.shape[:-1], case.dv, device="cuda").to(dtype)
    exact = tuple(t.to(F64) for t in (q, x, k, v))
    truth = with_gradients(lambda *t: ref.neighborhood_probe_attention(*t, **case.windows), exact, d_o)
    got = with_gradients(lambda *t: neighborhood_probe_attention(*t, **case.windows), (q, x, k, v), d_o)
    terms = float(d_o.abs().max() * v.abs().max() * k.abs().max())
    for name, g, t in zip(("o", "dq", "dx", "dk", "dv"), got, truth, strict=True):
        scale = 1e-3 * terms if name in ("dq", "dx", "dk") else 0.0
        assert_close(name, g, t, bound(name, 1.0, dtype), scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("d", [64, 128])
def test_whole_grid_is_the_dense_operator(d: int, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    q, k, v, d_o = (torch.randn(1, 64, 48, 2, d, device="cuda", dtype=dtype) for _ in range(4))
    solver = {"lam": 1.0, "backend": "portable", **CONVERGED}

    def flat(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return local_linear_attention(*(t.flatten(1, 2) for t in (q, k, v)), is_causal=False, **solver)

    want = with_gradients(flat, (q, k, v), d_o.flatten(1, 2))
    got = with_gradients(lambda *t: neighborhood_local_linear_attention(*t, -1, **solver), (q, k, v), d_o)
    want[0] = want[0].reshape(got[0].shape)
    for name, g, t in zip(NAMES, got, want, strict=False):
        assert_close(name, g, t.double(), bound(name, 1.0, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_window_of_one_is_exact(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 9, 10, 2, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
    o = neighborhood_local_linear_attention(q, k, v, 1, lam=1e-3)
    torch.testing.assert_close(o, v, rtol=2e-3, atol=1e-4)
    dq, dk, _ = torch.autograd.grad(o.sum(), (q, k, v))
    assert not dq.any()
    assert not dk.any()


def test_aux_and_repeats() -> None:
    torch.manual_seed(3)
    case = Case((40, 33), (7, 7), causal=(True, False), d=64, dv=64)
    q, k, v = (t.cuda().bfloat16().requires_grad_() for t in draw(case))

    def call() -> tuple[Tensor, ...]:
        o, info = neighborhood_local_linear_attention(q, k, v, lam=1.0, return_aux=True, **case.windows)
        return o, *info, *torch.autograd.grad(o.sum(), (q, k, v))

    first = call()
    _, lse = ref.neighborhood_local_linear_attention(
        *(t.double() for t in (q, k, v)), lam=1.0, **case.windows
    )
    torch.testing.assert_close(first[1].double(), lse, rtol=0, atol=1e-3)
    assert float(first[3].max()) <= 1e-3
    assert all(torch.equal(a, b) for a, b in zip(first, call(), strict=True))


@pytest.mark.parametrize("d", [32, 64, 128])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_hopper_and_portable_agree(d: int, kv_heads: int) -> None:
    torch.manual_seed(5)
    case = Case((40, 33), (13, 7), dilation=(1, 2), causal=(True, False), d=d, dv=d, Hq=4, Hk=kv_heads)
    inputs = [t.cuda().bfloat16() for t in draw(case)]
    d_o = torch.randn_like(inputs[0])
    one, other = (
        with_gradients(
            lambda *t, b=b: neighborhood_local_linear_attention(
                *t, lam=1.0, backend=b, **case.windows, **CONVERGED
            ),
            inputs,
            d_o,
        )
        for b in ("hopper", "portable")
    )
    for name, g, t in zip(NAMES, one, other, strict=False):
        # Each of the two may be off the truth by the bound.
        assert_close(name, g, t.double(), 2 * bound(name, 1.0, torch.bfloat16))


def test_what_runs_is_explained() -> None:
    t = torch.randn(1, 16, 16, 1, 64, device="cuda", dtype=torch.bfloat16)
    told = explain(neighborhood_local_linear_attention, t, t, t, 3, lam=1.0)
    on_hopper = torch.cuda.get_device_capability() == (9, 0)
    assert (told.backend, told.because) == ("hopper" if on_hopper else "portable", None)
