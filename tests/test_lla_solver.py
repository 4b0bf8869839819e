"""The contract of local linear attention's solver: tolerance, iterations, gradients of a truncated solve."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from compare import assert_accurate
from lla_cases import (
    CONVERGED,
    F64,
    NAMES,
    Case,
    Inputs,
    cluster,
    draw,
    drift_task,
    plain,
    rope,
    with_gradients,
)
from nearfield.lla import SolveInfo, local_linear_attention
from nearfield.lla import reference as ref
from torch import Tensor

ops = torch.ops.nearfield


def dense_system(inputs: Inputs, lam: float) -> tuple[Tensor, ...]:
    """p [m, n], kbar [m, d], A [m, d, d], g [m, d] of one causal head."""
    q, k = inputs.q[0, :, 0], inputs.k[0, :, 0]
    m, n, d = len(q), len(k), q.shape[1]
    mask = ref.visible_keys(m, n, is_causal=True, window=None)
    p = torch.softmax((inputs.scale * q @ k.T).masked_fill(~mask, -math.inf), 1)
    kbar = p @ k
    centred = k - kbar[:, None]
    system = torch.einsum("ij,ijd,ije->ide", p, centred, centred) + lam * torch.eye(d, dtype=F64)
    return p, kbar, system, q - kbar


def textbook_cg(system: Tensor, b: Tensor, steps: int) -> Tensor:
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    for _ in range(steps):
        ap = torch.einsum("ide,ie->id", system, p)
        rz = (r * r).sum(1, keepdim=True)
        alpha = rz / (p * ap).sum(1, keepdim=True).clamp_min(1e-300)
        x, r = x + alpha * p, r - alpha * ap
        p = r + (r * r).sum(1, keepdim=True) / rz.clamp_min(1e-300) * p
    return x


@pytest.mark.parametrize("make", [plain, rope, cluster], ids=lambda f: f.__name__)
@pytest.mark.parametrize("lam", [1.0, 0.1])
def test_default_tolerance_bounds_the_error(make: Callable[[int, int], Inputs], lam: float) -> None:
    inputs = make(200, 32)
    tol = 1e-3
    rows = torch.full((1, 200, 1, 1), lam, dtype=F64)
    o, x, *_, iterations, ratio = ops.lla_fwd(
        *inputs[:3], rows, None, inputs.scale, True, None, False, tol, 100
    )
    assert (ratio <= tol).all()
    assert (iterations < 100).all()
    truth, _ = ref.local_linear_attention(*inputs[:3], lam=lam, scale=inputs.scale)
    p, _, system, g = dense_system(inputs, lam)
    exact = torch.linalg.solve(system, g[..., None])[..., 0]
    dx = x[0, :, 0] - exact
    energy = torch.einsum("id,ide,ie->i", dx, system, dx).sqrt()
    v = inputs.v[0, :, 0]
    spread = (p @ v**2 - (p @ v) ** 2).clamp_min(0).sqrt()
    error = (o - truth)[0, :, 0].abs()
    assert (
        error <= spread * energy[:, None] * (1 + 1e-6) + 1e-12
    ).all()  # Cauchy-Schwarz: no constant to tune
    # The energy of the last step stands for what remains. It was at most 4.5 times too small in any study.
    assert (energy <= 4.5 * tol * (1 + torch.einsum("id,id->i", exact, g)).sqrt()).all()


def test_stopping_rule_is_honoured_and_reported() -> None:
    q, k, v, scale = rope(200, 32)
    aux: SolveInfo
    for tol, max_iters in ((1e-2, 50), (1e-3, 16), (1e-5, 8), (1e-4, 1)):
        _, aux = local_linear_attention(
            q, k, v, lam=0.1, scale=scale, tol=tol, max_iters=max_iters, return_aux=True
        )
        assert aux.iterations.dtype == torch.int32
        assert aux.iterations.shape == aux.ratio.shape == aux.lse.shape == (1, 200, 1)
        assert (aux.iterations <= max_iters).all()
        assert (aux.iterations[aux.ratio > tol] == max_iters).all(), (
            "only the last step may leave a row unconverged"
        )
    assert (aux.ratio > 1e-4).sum() > 100, "one step cannot solve these systems, and the ratio must say so"
    counts = [
        local_linear_attention(q, k, v, lam=0.1, scale=scale, tol=tol, max_iters=99, return_aux=True)[
            1
        ].iterations
        for tol in (1e-2, 1e-4)
    ]
    assert (counts[0] <= counts[1]).all()
    assert counts[0].double().mean() < counts[1].double().mean()


def test_iterations_and_ratio_follow_the_rule() -> None:
    """A row stops after the first step with alpha rz <= tol^2 (1 + acc), or after max_iters."""
    inputs = rope(60, 8)
    tol, max_iters = 1e-2, 6
    _, _, system, b = dense_system(inputs, 0.1)
    r, p = b.clone(), b.clone()
    acc = torch.zeros(60, dtype=F64)
    iterations, ratio = torch.zeros(60, dtype=torch.int32), torch.full((60,), math.inf, dtype=F64)
    for _ in range(max_iters):
        ap = torch.einsum("ide,ie->id", system, p)
        rz = (r * r).sum(1)
        alpha = rz / (p * ap).sum(1)
        acc = acc + alpha * rz
        live = ratio > tol
        ratio = torch.where(live, (alpha * rz / (1 + acc)).sqrt(), ratio)
        iterations += live
        r = r - alpha[:, None] * ap
        p = r + ((r * r).sum(1) / rz)[:, None] * p
    _, aux = local_linear_attention(
        *inputs[:3], lam=0.1, scale=inputs.scale, tol=tol, max_iters=max_iters, return_aux=True
    )
    rows = slice(1, None)  # row 0 has one key and is solved by one step up to rounding
    assert torch.equal(aux.iterations[0, rows, 0], iterations[rows])
    torch.testing.assert_close(aux.ratio[0, rows, 0], ratio[rows].float())
    assert 0 < int((ratio > tol).sum()) < 59, "the case must hold both kinds of rows"


def test_breakdown_is_reported() -> None:
    """The values of a ridge are not checked: a negative one allows no step, and the ratio says so."""
    q, k, v, _ = draw(Case())
    lam = torch.ones(1, 70, 2, dtype=F64)
    lam[0, 5] = -100.0
    _, aux = local_linear_attention(q, k, v, lam=lam, return_aux=True, **CONVERGED[F64])
    assert torch.equal(aux.ratio.isinf(), lam < 0)


def test_zero_tolerance_is_a_fixed_count() -> None:
    q, k, v, scale = rope(200, 32)
    _, aux = local_linear_attention(q, k, v, lam=0.1, scale=scale, tol=0, max_iters=7, return_aux=True)
    assert (aux.iterations[:, 2:] == 7).all()


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_truncated_solve_has_the_implicit_gradient(steps: int) -> None:
    """After few steps the gradient is that of the exact solution's conditions, at the x and y reached so far.

    That is the gradient of dO.o(x) + y.(g - A x) with x and y held fixed.
    """
    inputs = rope(40, 8)
    lam = 0.1
    d_o = torch.randn(40, 8, dtype=F64)
    p, kbar, system, g = dense_system(inputs, lam)
    x = textbook_cg(system, g, steps)
    gamma = d_o @ inputs.v[0, :, 0].T
    weights = p * (gamma - (p * gamma).sum(1, keepdim=True))
    h = torch.einsum("ij,ijd->id", weights, inputs.k[0, :, 0] - kbar[:, None])
    y = textbook_cg(system, h, steps)

    leaves = [t.clone().requires_grad_() for t in inputs[:3]]
    lam_leaf = torch.tensor(lam, dtype=F64, requires_grad=True)
    p, kbar, system, g = dense_system(Inputs(*leaves, inputs.scale), lam_leaf)  # type: ignore[arg-type]
    slope = torch.einsum("ijd,id->ij", leaves[1][0, :, 0] - kbar[:, None], x)
    o = (p * (1 + slope)) @ leaves[2][0, :, 0]
    lagrangian = (d_o * o).sum() + (y * (g - torch.einsum("ide,ie->id", system, x))).sum()
    want = torch.autograd.grad(lagrangian, [*leaves, lam_leaf])

    got = with_gradients(
        lambda q, k, v, lam: local_linear_attention(
            q, k, v, lam=lam, scale=inputs.scale, tol=0, max_iters=steps
        ),
        (*inputs[:3], torch.tensor(lam, dtype=F64)),
        d_o[None, :, None],
    )
    for name, a, b in zip(NAMES, got, (o.detach()[None, :, None], *want), strict=True):
        assert_accurate(name, a, b, b)


@pytest.mark.parametrize("steps", [2, 60])
def test_rows_of_the_score_gradient_sum_to_zero(steps: int) -> None:
    """Only if every row of dS sums to 0 do the gradients of the keys sum to -sum_i y_i, also when truncated.

    y is read off the gradient of a ridge per row and channel, -x y.
    """
    case = Case(m=70, n=90, Hq=1, Hk=1, d=8, dv=5)
    q, k, v, scale = draw(case)
    rows = torch.full((1, 70, 1, 8), 0.2, dtype=F64)
    options = (None, scale, True, None, False, 0.0, steps)
    _, x, kbar, lse, _, _ = ops.lla_fwd(q, k, v, rows, *options)
    d_o = torch.randn(1, 70, 1, 5, dtype=F64)
    _, dk, _, dlam = ops.lla_bwd(d_o, q, k, v, rows, x, kbar, lse, *options)
    torch.testing.assert_close(dk.sum((0, 1, 2)), (dlam / x).sum((0, 1, 2)), rtol=1e-9, atol=1e-9)


def test_gradient_is_linear_in_the_incoming_gradient() -> None:
    """A loss scale must not change where the second solve stops. Powers of two are exact."""
    inputs = rope(100, 16).cast(torch.float32)
    d_o = torch.randn_like(inputs.v)
    f = lambda q, k, v: local_linear_attention(q, k, v, lam=0.1)  # noqa: E731
    plain_grads, small = (with_gradients(f, inputs[:3], d_o * unit)[1:] for unit in (1.0, 2.0**-60))
    for a, b in zip(plain_grads, small, strict=True):
        assert torch.equal(a * 2.0**-60, b)


def test_drift_task() -> None:
    """Untrained regression under drift: 0.028 of the target's power in 16 steps; softmax has 0.15."""
    lla, softmax = 0.0, 0.0
    rows = torch.arange(
        256, 1024, 8
    )  # later segments, with the first query of each, which sees one key of its own
    for seed in (4, 5, 6):
        inputs, target = drift_task(seed)
        q, k, v = (t.bfloat16().float() for t in inputs[:3])
        for lam in (1e-4, 1e9):
            o = local_linear_attention(q, k, v, lam=lam, scale=32.0, max_iters=16)[0, :, 0].double()
            error = float((o - target)[rows].pow(2).mean() / target[rows].pow(2).mean()) / 3
            lla, softmax = (lla + error, softmax) if lam < 1 else (lla, softmax + error)
    assert lla <= 0.028
    assert softmax > 0.1
