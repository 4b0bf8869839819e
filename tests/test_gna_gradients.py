"""Neighborhood attention: which gradients are computed, and from what."""

from __future__ import annotations

import pytest
import torch
from gna_cases import Case, assert_same


@pytest.mark.parametrize("additional", [0, 2])
def test_gradcheck(additional: int) -> None:
    case = Case(
        (4, 5),
        (2, 3),
        (2, 1),
        (2, 1),
        (True, False),
        heads=2,
        heads_kv=1,
        dim=3,
        dim_v=2,
        additional=additional,
    )
    assert torch.autograd.gradcheck(lambda *inputs: case.run(list(inputs)), case.inputs(torch.float64))


def test_gradient_of_lse_alone() -> None:
    case = Case((6, 7), (3, 3), heads=2, dim=5)
    inputs = case.inputs(torch.float64)
    weight = torch.randn(1, 6, 7, 2, dtype=torch.float64)
    got = torch.autograd.grad((case.run(inputs)[1] * weight).sum(), inputs[:2])
    want = torch.autograd.grad((case.reference(inputs)[1] * weight).sum(), inputs[:2])
    for g, w in zip(got, want, strict=True):
        assert_same(g, w)


def test_second_derivatives_are_refused() -> None:
    case = Case((6,), (3,))
    inputs = case.inputs(torch.float64)
    (dq,) = torch.autograd.grad(case.run(inputs)[0].sum(), inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="neighborhood_attention: second derivatives"):
        torch.autograd.grad(dq.sum(), inputs[:1])


@pytest.mark.parametrize(
    "needed", range(6), ids=["q", "k", "v", "additional_keys", "additional_values", "bias"]
)
def test_only_one_input_requires_grad(needed: int) -> None:
    case = Case((6, 7), (3, 3), additional=3, biased=True)
    inputs = case.inputs(torch.float64)
    wanted = torch.autograd.grad(case.reference(inputs)[0].sum(), inputs)[needed]
    inputs = [t.detach().requires_grad_(i == needed) for i, t in enumerate(inputs)]
    (got,) = torch.autograd.grad(case.run(inputs)[0].sum(), inputs[needed])
    assert_same(got, wanted)


def test_without_grad() -> None:
    case = Case((6, 7), (3, 3))
    inputs = case.inputs(torch.float32)
    with torch.no_grad():
        out, lse = case.run(inputs)
    assert not out.requires_grad
    assert torch.equal(out, case.run([t.detach() for t in inputs])[0])
    assert torch.equal(lse, case.run(inputs)[1])
