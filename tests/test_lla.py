"""Local linear attention against its definition: values and gradients."""

from __future__ import annotations

import pytest
import torch
from compare import assert_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from lla_cases import DTYPES, F64, HOSTILE, LAMS, Case, check_attention, draw, dtype_id, with_gradients
from nearfield.lla import local_linear_attention, probe_attention
from nearfield.lla import reference as ref
from torch import Tensor

CASES = [
    Case(),
    Case(B=2, m=1, n=1, d=4, dv=8),
    Case(m=64, n=64, Hq=1, Hk=1, d=32, dv=32),
    Case(B=2, m=65, n=129, Hq=4, Hk=2, d=24, dv=40),
    Case(m=130, n=130, Hq=3, Hk=1, is_causal=False),
    Case(m=5, n=150, Hq=2, Hk=1, is_causal=False),
    Case(B=4, m=1, n=100, Hq=4, Hk=2),
    Case(m=90, n=60),  # the first queries see nothing
    Case(m=90, n=60, is_causal=False, window=9),
    Case(m=150, n=150, window=13),
    Case(m=100, n=150, window=70, Hq=2, Hk=1),
    Case(m=100, n=150, is_causal=False, window=12),
    Case(m=64, n=64, window=1),
    Case(m=64, n=64, is_causal=False, window=500),
]
case_ids = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@case_ids
def test_matches_definition(case: Case, dtype: torch.dtype) -> None:
    check_attention(draw(case), torch.full((case.B, case.m, case.Hq), 0.7, dtype=F64), dtype, **case.mask)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("ridge", ["relative", "absolute"])
@pytest.mark.parametrize("mode", LAMS)
def test_every_ridge(mode: str, ridge: str, dtype: torch.dtype) -> None:
    case = Case(B=2, m=50, n=70, Hq=4, Hk=2, d=8, dv=12)
    # With the absolute ridge lam exp(-lse) is what counts, and exp(-lse) is 0.002 to 0.02 here.
    lam = LAMS[mode](case) * (400 if ridge == "absolute" else 1)
    check_attention(draw(case), lam, dtype, ridge=ridge)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("lam", [10.0, 1.0, 0.1])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_inputs(name: str, lam: float, dtype: torch.dtype) -> None:
    make, n, d = HOSTILE[name]
    check_attention(make(n, d), torch.full((1, n, 1), lam, dtype=F64), dtype)


@settings(max_examples=60)
@given(data=st.data())
def test_sweep(data: st.DataObject) -> None:
    integers = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    kv_heads = integers(1, 2)
    case = Case(
        B=integers(1, 2), m=integers(1, 80), n=integers(1, 140), Hq=kv_heads * integers(1, 3), Hk=kv_heads,
        d=integers(1, 20), dv=integers(1, 20), is_causal=data.draw(st.booleans()),
        window=data.draw(st.none() | st.integers(1, 150)),
    )  # fmt: skip
    torch.manual_seed(integers(0, 1000))
    inputs = draw(case)._replace(scale=data.draw(st.floats(-1, 1)))
    lam = LAMS[data.draw(st.sampled_from(list(LAMS)))](case)
    check_attention(inputs, lam, F64, ridge=data.draw(st.sampled_from(["relative", "absolute"])), **case.mask)


def test_long_rows_recompute_their_probabilities() -> None:
    """Beyond 16384 visible keys a query tile no longer keeps its softmax weights."""
    check_attention(
        draw(Case(m=3, n=17_000, d=4, dv=4, Hq=1, Hk=1)),
        torch.tensor(0.5, dtype=F64),
        torch.float32,
        is_causal=False,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@case_ids
def test_probe_matches_definition(case: Case, dtype: torch.dtype) -> None:
    work = F64 if dtype == F64 else torch.float32
    q, k, v, scale = (t.to(dtype) if isinstance(t, Tensor) else t for t in draw(case))
    x = torch.randn_like(q)
    d_o = torch.randn(*q.shape[:3], case.dv).to(dtype)

    def definition(*t: Tensor) -> Tensor:
        return ref.probe_attention(*t, scale=scale, **case.mask)

    truth = with_gradients(definition, tuple(t.to(F64) for t in (q, x, k, v)), d_o)
    eager = with_gradients(definition, tuple(t.to(work) for t in (q, x, k, v)), d_o)
    got = with_gradients(lambda *t: probe_attention(*t, scale=scale, **case.mask), (q, x, k, v), d_o)
    for name, g, t, e in zip(("o", "dq", "dx", "dk", "dv"), got, truth, eager, strict=True):
        assert_accurate(name, g, t, e.to(g.dtype))


@pytest.mark.parametrize("mode", LAMS)
def test_gradcheck(mode: str) -> None:
    case = Case(B=1, m=4, n=6, Hq=2, Hk=1, d=3, dv=2)
    q, k, v, scale = draw(case)
    leaves = [t.requires_grad_() for t in (q, k, v, LAMS[mode](case))]
    options = {"scale": scale, "tol": 0.0, "max_iters": 60}
    assert torch.autograd.gradcheck(
        lambda q, k, v, lam: local_linear_attention(q, k, v, lam=lam, **options), leaves
    )


def test_probe_gradcheck() -> None:
    q, k, v, scale = draw(Case(B=1, m=4, n=6, Hq=2, Hk=1, d=3, dv=2))
    leaves = [t.requires_grad_() for t in (q, torch.randn_like(q), k, v)]
    assert torch.autograd.gradcheck(lambda *t: probe_attention(*t, scale=scale, window=3), leaves)
