"""Local linear attention where the result is known: exact rows, empty rows, limits of its parameters."""

from __future__ import annotations

import math

import pytest
import torch
from lla_cases import DTYPES, F64, Case, draw, dtype_id, with_gradients
from nearfield.lla import local_linear_attention, local_linear_attention_step, probe_attention


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("lam", [1e-3, 1.0])
def test_single_visible_key_is_exact(lam: float, dtype: torch.dtype) -> None:
    """One key leaves nothing to fit: o = v and no gradient but that of v, bit for bit, whatever the ridge."""
    inputs = draw(Case(B=2, m=70, n=70, Hq=2, Hk=1, d=24)).cast(dtype)
    lam_tensor = torch.tensor(lam, dtype=F64 if dtype == F64 else torch.float32)
    d_o = torch.randn(2, 70, 2, 16).to(dtype)
    o, dq, dk, dv, dlam = with_gradients(
        lambda q, k, v, lam: local_linear_attention(q, k, v, lam=lam, window=1),
        (*inputs[:3], lam_tensor),
        d_o,
    )
    assert torch.equal(o, inputs.v.expand_as(o))
    assert not dq.any()
    assert not dk.any()
    assert not dlam.any()
    torch.testing.assert_close(dv.float(), d_o.float().sum(2, keepdim=True).to(dtype).float(), rtol=0, atol=0)


def test_first_causal_row_is_exact() -> None:
    q, k, v, _ = draw(Case(n=100, m=100, d=24)).cast(torch.float32)
    o, aux = local_linear_attention(q, k, v, lam=1e-3, return_aux=True)
    assert torch.equal(o[:, 0], v[:, 0])
    assert (aux.iterations[:, 0] <= 2).all()


def test_rows_without_keys() -> None:
    case = Case(B=2, m=90, n=60, Hq=2, Hk=1)
    inputs = draw(case)
    leaves = [t.requires_grad_() for t in (*inputs[:3], torch.full((2, 90, 2), 0.5, dtype=F64))]
    o, aux = local_linear_attention(*leaves[:3], lam=leaves[3], return_aux=True)
    dq, dk, dv, dlam = torch.autograd.grad(o, leaves, torch.randn_like(o))
    assert not o[:, :30].any()
    assert (aux.lse[:, :30] == -math.inf).all()
    assert not aux.iterations[:, :30].any()
    assert not aux.ratio[:, :30].any()
    assert not dq[:, :30].any()
    assert not dlam[:, :30].any()
    assert o[:, 30:].all()
    for gradient in (dk, dv):
        assert gradient.isfinite().all()


def test_nan_is_not_hidden() -> None:
    q, k, v, _ = draw(Case(n=100, m=100))
    q[0, 7, 1] = math.nan
    k[0, 80, 0] = math.nan
    o, aux = local_linear_attention(q, k, v, lam=1.0, return_aux=True)
    for row in (o.isnan().all(-1)[0], aux.ratio.isnan()[0], aux.lse.isnan()[0]):
        assert row[7].tolist() == [False, True]
        assert row[80:, 0].all()
        assert not row[:64, 0].any()  # a query tile that does not touch the key
    step = local_linear_attention_step(q[:, 7:8], k[:, :8], v[:, :8], lam=1.0)
    assert torch.equal(step.isnan().all(-1), torch.tensor([[[False, True]]]))


EMPTY = [Case(B=0), Case(m=0), Case(n=0), Case(n=0, is_causal=False), Case(Hq=0, Hk=0), Case(dv=0)]


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_zero_sizes(shape: Case) -> None:
    inputs = draw(shape)
    leaves = [t.requires_grad_() for t in (*inputs[:3], torch.tensor(0.5, dtype=F64))]
    o = local_linear_attention(*leaves[:3], lam=leaves[3], is_causal=shape.is_causal)
    assert o.shape == (shape.B, shape.m, shape.Hq, shape.dv)
    assert not o.any()
    for gradient in torch.autograd.grad(o, leaves, torch.ones_like(o)):
        assert not gradient.any()
    step = local_linear_attention_step(*(t.detach() for t in leaves[:3]), lam=0.5)
    assert step.shape == o.shape
    assert not step.any()


def test_large_ridge_is_softmax_attention() -> None:
    q, k, v, _ = draw(Case(n=100, m=100, d=16))
    sdpa = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True
    )
    torch.testing.assert_close(
        local_linear_attention(q, k, v, lam=1e13), sdpa.transpose(1, 2), rtol=1e-10, atol=1e-10
    )
    x = torch.zeros_like(q)
    torch.testing.assert_close(probe_attention(q, x, k, v), sdpa.transpose(1, 2), rtol=1e-12, atol=1e-12)


def test_zero_scale_is_global_affine_ridge_regression() -> None:
    q, k, v, _ = draw(Case(n=90, m=40, Hq=1, Hk=1, d=8))
    lam = 0.3
    k0, v0 = k[0, :, 0], v[0, :, 0]
    kc, vc = k0 - k0.mean(0), v0 - v0.mean(0)
    slope = torch.linalg.solve(kc.T @ kc / 90 + lam * torch.eye(8, dtype=F64), kc.T @ vc / 90)
    want = v0.mean(0) + (q[0, :, 0] - k0.mean(0)) @ slope
    got = local_linear_attention(q, k, v, lam=lam, scale=0.0, is_causal=False, tol=0, max_iters=60)
    torch.testing.assert_close(got[0, :, 0], want, rtol=1e-11, atol=1e-11)


def test_affine_values_are_reproduced() -> None:
    """The values are an affine map of the keys: with a vanishing ridge o is that map of the query."""
    q, k, _, _ = draw(Case(n=60, m=20, Hq=1, Hk=1, d=6))
    weight, bias = torch.randn(6, 5, dtype=F64), torch.randn(5, dtype=F64)
    o = local_linear_attention(q, k, k @ weight + bias, lam=1e-9, tol=0, max_iters=60)
    torch.testing.assert_close(o, q @ weight + bias, rtol=1e-6, atol=1e-6)
