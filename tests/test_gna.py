"""Neighborhood attention: values and gradients against the float64 definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gna_cases import DTYPES, Case, check, problems
from hypothesis import given
from hypothesis import strategies as st

CASES = [
    Case((1,), (1,), label="one-token"),
    Case((37,), (5,), batch=2, heads=3, dim=60),
    Case((700,), (600,), heads=1, dim=16, label="line-longer-than-a-block"),
    Case((300,), (290,), (7,), causal=(True,), heads=2, dim=5, dim_v=3, label="causal-blocks"),
    Case((64,), (16,), (16,), dim=32, label="blocked"),
    Case((50,), (6,), (4,), (3,), (True,), heads=4, heads_kv=2),
    Case((13, 17), (5, 7), batch=2, heads=4, heads_kv=1, dim=64, dim_v=40, label="gqa"),
    Case((23, 19), (3, 4), (2, 3), (3, 4), heads=1, dim=24, label="dilation-does-not-divide"),
    Case((16, 16), (16, 16), dim=16, label="dense"),
    Case((11, 14), (11, 3), (1, 3), causal=(True, False), dim_v=17, label="full-in-one-dimension"),
    Case(
        (4, 9, 11),
        (4, 3, 5),
        (1, 2, 2),
        (1, 2, 1),
        (True, False, False),
        heads=4,
        heads_kv=2,
        dim=32,
        dim_v=8,
    ),
    Case((5, 6, 7), (2, 2, 2), (2, 1, 2), (2, 3, 3), (False, True, True), batch=2),
    Case((1, 12, 10), (1, 5, 3), heads=1, dim=128, label="single-frame"),
    Case((9, 10), (3, 3), additional=5, heads=4, heads_kv=2, dim_v=12, label="additional"),
    Case((40,), (7,), (3,), additional=300, batch=2, heads=2, dim=16, label="many-additional"),
    Case((48, 48), (3, 3), additional=3, heads=1, dim=4, label="additional-in-chunks"),
    Case((40,), (7,), batch=2, heads=3, dim=16, biased=True),
    Case((300,), (290,), (7,), causal=(True,), heads=2, dim=5, biased=True, label="causal-blocks"),
    Case((23, 19), (3, 4), (2, 3), (3, 4), heads=4, heads_kv=2, dim=24, biased=True),
    Case((9, 10), (5, 3), additional=5, batch=2, heads=4, heads_kv=2, dim_v=12, biased=True),
    Case((4, 9, 11), (4, 3, 5), (1, 2, 2), (1, 2, 1), (True, False, False), heads=2, biased=True),
    Case((8, 9), (3, 3), scale=-1.5, biased=True, label="negative-scale"),
    Case((40,), (7,), batch=2, heads=3, dim=16, periodic=(True,)),
    Case((41,), (41,), (5,), heads=1, periodic=(True,), label="whole-circle"),
    Case((41,), (41,), (5,), heads=1, biased=True, periodic=(True,), label="whole-circle"),
    Case((24, 19), (3, 4), (2, 3), (3, 4), heads=4, heads_kv=2, periodic=(True, False), label="cylinder"),
    Case((24, 20), (5, 4), (1, 3), (3, 4), additional=5, biased=True, periodic=(True, True), label="torus"),
    Case((4, 8, 9), (4, 3, 5), (1, 2, 5), causal=(True, False, False), periodic=(False, True, True)),
    Case((8, 9), (3, 3), scale=0.0, label="scale-0"),
    Case((8, 9), (3, 4), scale=-2.5, label="negative-scale"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@given(problems())
def test_random_problems(case: Case) -> None:
    check(case, torch.float64)


@given(problems(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_random_problems_in_lower_precision(case: Case, dtype: torch.dtype) -> None:
    # The yardstick can be exact by luck on a handful of values.
    if int(np.prod(case.size)) < 24:
        return
    check(case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["large-scores", "constant", "offset-values", "one-hot-softmax"])
def test_hostile_inputs(kind: str, dtype: torch.dtype) -> None:
    case = Case((9, 20), (5, 9), dim=32, additional=4)
    inputs = case.inputs(torch.float64)
    with torch.no_grad():
        if kind == "large-scores":
            for t in inputs[:2]:
                t.mul_(30)
        elif kind == "constant":
            for t in inputs:
                t.fill_(0.5)
        elif kind == "offset-values":
            inputs[2].add_(100)
            inputs[4].add_(100)
        else:
            inputs[1].zero_()
            inputs[1][:, 4, 10] = 1000
    check(case, dtype, [t.detach().to(dtype).requires_grad_() for t in inputs])
