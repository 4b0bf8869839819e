"""The reference of local linear attention itself."""

from __future__ import annotations

import pytest
import torch
from lla_cases import Case, draw
from nearfield.lla import reference as ref


@pytest.mark.parametrize("lam", [1.0, 0.01])
@pytest.mark.parametrize(
    "case", [Case(n=40, m=40, Hq=1, Hk=1, d=8), Case(n=40, m=12, Hq=1, Hk=1, d=8, window=7)], ids=str
)
def test_reference_solves_the_least_squares_problem(case: Case, lam: float) -> None:
    q, k, v, scale = draw(case)
    o, _ = ref.local_linear_attention(q, k, v, lam=lam, scale=scale, **case.mask)
    mask = ref.visible_keys(case.m, case.n, **case.mask)
    fit = ref.penalised_least_squares(q[0, :, 0], k[0, :, 0], v[0, :, 0], lam=lam, scale=scale, mask=mask)
    torch.testing.assert_close(o[0, :, 0], fit, rtol=1e-10, atol=1e-10)


def test_visible_keys_by_hand() -> None:
    def rows(m: int, n: int, is_causal: bool, window: int | None) -> list[str]:
        mask = ref.visible_keys(m, n, is_causal=is_causal, window=window)
        return ["".join("x" if seen else "." for seen in row) for row in mask.tolist()]

    assert rows(2, 4, True, None) == ["xxx.", "xxxx"]
    assert rows(3, 2, True, None) == ["..", "x.", "xx"]
    assert rows(4, 4, True, 2) == ["x...", "xx..", ".xx.", "..xx"]
    assert rows(5, 5, False, 3) == ["xxx..", "xxx..", ".xxx.", "..xxx", "..xxx"]
    assert rows(5, 5, False, 4) == ["xxxx.", "xxxx.", "xxxx.", ".xxxx", ".xxxx"]
    assert rows(2, 5, False, 3) == ["..xxx", "..xxx"]
    assert rows(2, 2, False, 7) == ["xx", "xx"]
