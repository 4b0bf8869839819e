"""Decoding with local linear attention: queries against a cache of keys and values."""

from __future__ import annotations

import math

import pytest
import torch
from compare import assert_accurate
from lla_cases import CONVERGED, DTYPES, F64, HOSTILE, LAMS, Case, draw, dtype_id
from nearfield.lla import local_linear_attention, local_linear_attention_step
from nearfield.lla import reference as ref


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("window", [None, 10])
@pytest.mark.parametrize("ridge", ["relative", "absolute"])
def test_decode_matches_definition(ridge: str, window: int | None, dtype: torch.dtype) -> None:
    lengths = [130, 3, 0, 64, 1]
    work = F64 if dtype == F64 else torch.float32
    inputs = draw(Case(B=5, m=3, n=130, Hq=4, Hk=2, d=16, dv=24)).cast(dtype)
    lam = 0.7 * (20 if ridge == "absolute" else 1)
    q, k, v = (t.clone() for t in inputs[:3])
    for b, length in enumerate(lengths):  # behind its length the cache holds rubbish
        k[b, length:], v[b, length:] = math.nan, math.nan
    got = local_linear_attention_step(
        q, k, v, lam=lam, cache_seqlens=torch.tensor(lengths), window=window, ridge=ridge
    )
    for b, length in enumerate(lengths):
        truth, eager = (
            ref.local_linear_attention(
                *(t[b : b + 1, : t.shape[1] if t is q else length].to(kind) for t in (q, k, v)),
                lam=lam, window=window, ridge=ridge,
            )[0]
            for kind in (F64, work)
        )  # fmt: skip
        assert_accurate(f"o[{b}]", got[b : b + 1], truth, eager.to(dtype))


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("lam", [1.0, 0.1])
def test_decode_hostile_inputs(name: str, lam: float) -> None:
    make, n, d = HOSTILE[name]
    inputs = make(n, d).cast(torch.float32)
    truth, eager = (
        ref.local_linear_attention(*inputs.cast(kind)[:3], lam=lam, scale=inputs.scale)[0]
        for kind in (F64, torch.float32)
    )
    got = local_linear_attention_step(*inputs[:3], lam=lam, scale=inputs.scale)
    assert_accurate("o", got, truth, eager)


@pytest.mark.parametrize("mode", LAMS)
def test_decode_equals_prefill(mode: str) -> None:
    case = Case(B=2, m=80, n=80, Hq=4, Hk=2)
    q, k, v, scale = draw(case)
    lam = LAMS[mode](case)
    whole = local_linear_attention(q, k, v, lam=lam, scale=scale, window=30, **CONVERGED[F64])
    for t in range(0, 80, 9):
        token = lam[:, t : t + 1] if mode == "token" else lam
        lengths = torch.full((2,), t + 1, dtype=torch.int32)
        step = local_linear_attention_step(
            q[:, t : t + 1], k, v, lam=token, cache_seqlens=lengths, scale=scale, window=30
        )
        torch.testing.assert_close(step, whole[:, t : t + 1], rtol=1e-10, atol=1e-10)


def test_decode_has_no_gradient() -> None:
    q, k, v, _ = draw(Case(m=1))
    with pytest.raises(ValueError, match="q requires grad"):
        local_linear_attention_step(q.requires_grad_(), k, v, lam=1.0)
    with torch.no_grad():
        assert not local_linear_attention_step(q, k, v, lam=1.0).requires_grad
