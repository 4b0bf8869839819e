"""Neighborhood attention: who sees whom, on lines, circles and grids."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gna_cases import Case, problems
from hypothesis import given
from nearfield import neighborhood_attention
from nearfield.gna.reference import neighborhood_mask, visible_keys
from torch import Tensor

# (L, w, s, d, causal): inclusive first-last key of every query, worked out by hand.
TABLE = [
    (8, 3, 1, 1, False, "0-2 0-2 1-3 2-4 3-5 4-6 5-7 5-7"),
    (8, 4, 1, 1, False, "0-3 0-3 0-3 1-4 2-5 3-6 4-7 4-7"),
    (8, 5, 2, 1, False, "0-4 0-4 1-5 1-5 3-7 3-7 3-7 3-7"),
    (8, 4, 2, 1, False, "0-3 0-3 1-4 1-4 3-6 3-6 4-7 4-7"),
    (8, 4, 3, 1, False, "0-3 0-3 0-3 2-5 2-5 2-5 4-7 4-7"),
    (8, 4, 4, 1, False, "0-3 0-3 0-3 0-3 4-7 4-7 4-7 4-7"),
    (10, 4, 4, 1, False, "0-3 0-3 0-3 0-3 4-7 4-7 4-7 4-7 6-9 6-9"),
    (8, 8, 3, 1, False, "0-7 0-7 0-7 0-7 0-7 0-7 0-7 0-7"),
    (8, 3, 1, 1, True, "0-0 0-1 0-2 1-3 2-4 3-5 4-6 5-7"),
    (8, 4, 2, 1, True, "0-0 0-1 0-2 0-3 2-4 2-5 4-6 4-7"),
    (8, 4, 4, 1, True, "0-0 0-1 0-2 0-3 4-4 4-5 4-6 4-7"),
    (10, 4, 4, 1, True, "0-0 0-1 0-2 0-3 4-4 4-5 4-6 4-7 6-8 6-9"),
    (8, 3, 1, 2, False, "0-4 1-5 0-4 1-5 2-6 3-7 2-6 3-7"),
    (9, 3, 1, 2, False, "0-4 1-5 0-4 1-5 2-6 3-7 4-8 3-7 4-8"),
    (9, 3, 2, 2, False, "0-4 1-5 0-4 1-5 4-8 3-7 4-8 3-7 4-8"),
    (9, 3, 1, 2, True, "0-0 1-1 0-2 1-3 0-4 1-5 2-6 3-7 4-8"),
    (9, 4, 2, 2, True, "0-0 1-1 0-2 1-3 0-4 1-5 0-6 1-7 2-8"),
]
# The same from the side of the keys: inclusive first-last query that sees them.
INVERSE_TABLE = [
    (8, 3, 1, 1, False, "0-1 0-2 0-3 2-4 3-5 4-7 5-7 6-7"),
    (8, 4, 2, 1, False, "0-1 0-3 0-3 0-5 2-7 4-7 4-7 6-7"),
    (8, 4, 2, 1, True, "0-3 1-3 2-5 3-5 4-7 5-7 6-7 7-7"),
]


def table_mask(text: str, dilation: int) -> Tensor:
    ranges = [tuple(int(x) for x in part.split("-")) for part in text.split()]
    mask = torch.zeros(len(ranges), len(ranges), dtype=torch.bool)
    for x, (first, last) in enumerate(ranges):
        mask[x, first : last + 1 : dilation] = True
    return mask


def masks_of_kernel(size: tuple[int, ...], *windows: Any) -> tuple[Tensor, Tensor]:
    """Who sees whom, read off the output for one-hot values and off dV for one-hot gradients."""
    n = int(np.prod(size))
    window, stride, dilation, causal, *periodic = windows
    q = torch.zeros(1, *size, 1, 1, dtype=torch.float64)
    one_hot = torch.eye(n, dtype=torch.float64).reshape(1, *size, 1, n)
    v = one_hot.clone().requires_grad_()
    out = neighborhood_attention(
        q,
        q,
        v,
        window,
        stride=stride,
        dilation=dilation,
        is_causal=causal,
        periodic=periodic[0] if periodic else False,
    )
    assert isinstance(out, Tensor)
    (dv,) = torch.autograd.grad(out, v, one_hot)
    probability = out.detach().reshape(n, n)
    torch.testing.assert_close(dv.reshape(n, n).T, probability, rtol=1e-13, atol=0)
    torch.testing.assert_close(probability.sum(1), torch.ones(n, dtype=torch.float64), rtol=1e-13, atol=0)
    return probability > 0, dv.reshape(n, n) > 0


@pytest.mark.parametrize("row", TABLE, ids=lambda r: f"L{r[0]}-w{r[1]}-s{r[2]}-d{r[3]}-c{int(r[4])}")
def test_hand_table(row: tuple[int, int, int, int, bool, str]) -> None:
    length, *windows, text = row
    want = table_mask(text, row[3])
    assert torch.equal(neighborhood_mask([length], *([w] for w in windows)), want)
    assert torch.equal(masks_of_kernel((length,), *windows)[0], want)


@pytest.mark.parametrize("row", INVERSE_TABLE, ids=lambda r: f"L{r[0]}-w{r[1]}-s{r[2]}-c{int(r[4])}")
def test_hand_table_of_inverse_windows(row: tuple[int, int, int, int, bool, str]) -> None:
    length, *windows, text = row
    assert torch.equal(masks_of_kernel((length,), *windows)[1], table_mask(text, 1))


def line_problems(longest: int) -> list[tuple[int, int, int, int, bool]]:
    return [
        (length, w, s, d, causal)
        for length in range(1, longest + 1)
        for d in range(1, length + 1)
        for w in range(1, length // d + 1)
        for s in range(1, w + 1)
        for causal in (False, True)
    ]


def test_consequences_of_the_definition() -> None:
    for length, w, s, d, causal in line_problems(14):
        for residue in range(d):
            group = range(residue, length, d)
            seen = [visible_keys(x, length, w, s, d, causal) for x in group]
            starts, ends = [keys[0] for keys in seen], [keys[-1] for keys in seen]
            assert starts == sorted(starts)
            assert ends == sorted(ends)
            for i, (x, keys) in enumerate(zip(group, seen, strict=True)):
                assert x in keys
                assert all((key - x) % d == 0 for key in keys)
                assert starts[i] == starts[i // s * s]
                if causal:
                    assert keys[-1] == x
                    leader = min(i // s * s + s - 1, len(group) - 1)
                    assert len(keys) == min(w - (leader - i), i + 1)
                else:
                    assert len(keys) == w
                    assert keys == seen[i // s * s]


@pytest.mark.parametrize("length", range(1, 11))
def test_every_small_circle(length: int) -> None:
    """A circle has no end: without stride, turning it turns the result; every query sees w keys, itself among them."""
    for problem in line_problems(length):
        _, w, s, d, causal = problem
        if problem[0] != length or causal or length % d != 0:
            continue
        want = neighborhood_mask(*([p] for p in problem), [True])
        forward, inverse = masks_of_kernel((length,), w, s, d, False, True)
        assert torch.equal(forward, want), problem
        assert torch.equal(inverse, want.T), problem
        assert (want.sum(1) == w).all()
        assert want.diagonal().all()
        if s == 1:
            assert torch.equal(want.roll((d, d), (0, 1)), want)


@pytest.mark.parametrize("length", range(1, 14))
def test_every_small_line(length: int) -> None:
    """Windows and inverse windows of the kernels against the definition, for all parameters."""
    for problem in line_problems(length):
        if problem[0] != length:
            continue
        want = neighborhood_mask(*([p] for p in problem))
        forward, inverse = masks_of_kernel((length,), *problem[1:])
        assert torch.equal(forward, want), problem
        assert torch.equal(inverse, want.T), problem


@given(problems(most=40))
def test_windows_of_random_grids(case: Case) -> None:
    want = neighborhood_mask(case.size, *case.windows, case.periodic)
    forward, inverse = masks_of_kernel(case.size, *case.windows, case.periodic)
    assert torch.equal(forward, want)
    assert torch.equal(inverse, want.T)
