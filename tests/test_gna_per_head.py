"""Neighborhood attention with windows per head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gna_cases import (
    PER_HEAD,
    Case,
    assert_same,
    biased_per_head,
    double_qkv,
    per_head_inputs,
    run_head_by_head,
    run_per_head,
    run_with_grads,
)
from nearfield import neighborhood_attention
from nearfield.gna.reference import neighborhood_attention_reference


@pytest.mark.parametrize("additional", [0, 3])
@pytest.mark.parametrize("problem", PER_HEAD, ids=str)
def test_windows_per_head(problem: tuple[Any, ...], additional: int) -> None:
    inputs = per_head_inputs(problem, additional, torch.float64, 6)
    grads = [torch.randn_like(t) for t in run_per_head(problem, inputs)]
    got = run_with_grads(lambda t: run_per_head(problem, t), inputs, grads)
    want = run_with_grads(lambda t: run_head_by_head(problem, t), inputs, grads)
    for g, w in zip(got, want, strict=True):
        assert_same(g, w)


def test_reference_with_windows_per_head() -> None:
    problem = PER_HEAD[1]
    inputs = per_head_inputs(problem, 2, torch.float64, 6)
    q, k, v, *extra = inputs
    ones, off = ((1, 1),) * 4, ((False, False),) * 4
    got = neighborhood_attention_reference(q, k, v, problem[3], ones, ones, off, 6**-0.5, *extra)
    for g, w in zip(got, run_head_by_head(problem, inputs), strict=True):
        assert_same(g, w)


def test_bias_with_windows_per_head() -> None:
    inputs = Case((12, 13), (5, 4), heads=4, batch=2, biased=True).inputs(torch.float64)
    grads = [torch.randn_like(t) for t in biased_per_head(inputs)]
    got = run_with_grads(biased_per_head, inputs, grads)
    want = run_with_grads(lambda t: biased_per_head(t, neighborhood_attention_reference), inputs, grads)
    for g, w in zip(got, want, strict=True):
        assert_same(g, w)


def test_equal_windows_per_head_are_windows() -> None:
    q, k, v = double_qkv(1, 9, 10, 3, 6)
    got = neighborhood_attention(q, k, v, ((3, 5),) * 3, stride=((1, 2),) * 3)
    assert torch.equal(got, neighborhood_attention(q, k, v, (3, 5), stride=(1, 2)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arguments,words",
    [
        ({"kernel_size": ((3, 3), (3, 3))}, ["kernel_size", "4 heads"]),
        ({"kernel_size": 3, "stride": ((1, 1),) * 5}, ["stride", "4 heads"]),
        ({"kernel_size": ((3, 3), (3, 3), (5, 5), (3, 3))}, ["query heads 2 and 3", "[5, 5]"]),
        ({"kernel_size": ((3, 3), 3, (3,), (3, 3))}, ["kernel_size", "(3,)"]),
        ({"kernel_size": ((3, 3), (3, 3), (9, 9), (9, 9))}, ["kernel_size [9, 9]", "[6, 7]"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_windows_per_head(arguments: dict[str, Any], words: list[str]) -> None:
    q, k = torch.zeros(1, 6, 7, 4, 8), torch.zeros(1, 6, 7, 2, 8)
    with pytest.raises(ValueError, match="neighborhood_attention: ") as error:
        neighborhood_attention(q, k, k, **arguments)
    assert all(word in str(error.value) for word in words), error.value


def test_direct_calls_with_windows_per_head_are_checked() -> None:
    q, k = torch.zeros(1, 6, 4, 8), torch.zeros(1, 6, 2, 8)
    ones = [1] * 4
    with pytest.raises(RuntimeError, match="query heads 2 and 3 share a key/value head"):
        torch.ops.nearfield.gna_fwd(q, k, k, None, None, [3, 3, 5, 3], ones, ones, [0] * 4, 1.0)
    with pytest.raises(RuntimeError, match="or as many for every query head"):
        torch.ops.nearfield.gna_fwd(q, k, k, None, None, [3, 3], ones, ones, [0] * 4, 1.0)
