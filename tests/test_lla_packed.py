"""Local linear attention over packed sequences."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from lla_cases import F64, Case, check_attention, draw, dtype_id, with_gradients
from nearfield.lla import local_linear_attention, probe_attention
from torch import Tensor

# Sequences of 1, 0, 69, 130 and 63 tokens, and 7 tokens behind the last.
BOUNDS = [0, 1, 1, 70, 200, 263]
PACKED_CASES = [
    Case(m=270, n=270, Hq=4, Hk=2, d=16, dv=24),
    Case(m=270, n=270, window=13),
    Case(m=270, n=270, is_causal=False),
    Case(m=270, n=270, is_causal=False, window=12),
]
each_packed_case = pytest.mark.parametrize("case", PACKED_CASES, ids=str)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=dtype_id)
@each_packed_case
def test_packed_matches_definition(case: Case, dtype: torch.dtype) -> None:
    lam = torch.full((1, case.m, case.Hq), 0.7, dtype=F64)
    check_attention(draw(case), lam, dtype, **case.mask, cu_seqlens=torch.tensor(BOUNDS))


def packed_parts(bounds: list[int], tensors: list[Tensor]) -> list[list[Tensor]]:
    return [[t[:, begin:end] for t in tensors] for begin, end in itertools.pairwise(bounds) if begin < end]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=dtype_id)
@each_packed_case
def test_packed_is_as_many_calls(case: Case, dtype: torch.dtype) -> None:
    """Bit for bit, whatever the tokens behind the last sequence hold."""
    inputs, end = draw(case).cast(torch.float32), BOUNDS[-1]
    x, d_o = torch.randn(inputs.q.shape), torch.randn(1, case.m, case.Hq, case.dv)
    lam = torch.rand(1, case.m, case.Hq) + 0.1
    tensors = (*inputs[:3], x, lam)
    for t in (*tensors, d_o):
        t[:, end:] = math.nan
    mask: dict[str, Any] = dict(case.mask)

    def attend(q: Tensor, k: Tensor, v: Tensor, x: Tensor, lam: Tensor) -> Tensor:
        return local_linear_attention(q, k, v, lam=lam, **mask) + probe_attention(q, x, k, v, **mask)

    parts = packed_parts(BOUNDS, [*tensors, d_o])
    want = [with_gradients(attend, tuple(part[:-1]), part[-1]) for part in parts]
    mask["cu_seqlens"] = torch.tensor(BOUNDS, dtype=dtype)
    got = with_gradients(attend, tensors, d_o)
    for part, alone in zip(packed_parts(BOUNDS, got), want, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part, alone, strict=True))
    assert all((t[:, end:] == 0).all() for t in got)
    aux = local_linear_attention(*inputs[:3], lam=lam, **mask, return_aux=True)[1]
    assert (aux.lse[:, end:] == -math.inf).all()
    assert (aux.iterations[:, end:] == 0).all()
    assert (aux.ratio[:, end:] == 0).all()


def test_no_sequences() -> None:
    q, k, v = (torch.full((1, 5, 2, 8), math.nan) for _ in range(3))
    cu_seqlens = torch.zeros(1, dtype=torch.int64)
    assert (local_linear_attention(q, k, v, lam=1.0, cu_seqlens=cu_seqlens) == 0).all()
    assert (probe_attention(q, q, k, v, cu_seqlens=cu_seqlens) == 0).all()


@pytest.mark.parametrize(
    "cu_seqlens, error, message",
    [
        ([0, 5], TypeError, "cu_seqlens must be a torch.Tensor, got list"),
        (torch.tensor([0.0, 5.0]), ValueError, "cu_seqlens has dtype torch.float32, expected int32 or int64"),
        (torch.tensor([[0, 5]]), ValueError, r"cu_seqlens has shape \[1, 2\]"),
        (torch.zeros(0, dtype=torch.int64), ValueError, r"cu_seqlens has shape \[0\]"),
        (torch.tensor([0, 5], device="meta"), ValueError, "cu_seqlens is on meta, but q is on cpu"),
        (torch.tensor([1, 5]), RuntimeError, "cu_seqlens starts with 1, expected 0"),
        (torch.tensor([0, 4, 3]), RuntimeError, "cu_seqlens decreases from 4 to 3 after sequence 1"),
        (torch.tensor([0, 6]), RuntimeError, "cu_seqlens ends with 6, but there are 5 tokens"),
    ],
)
def test_bad_packing(cu_seqlens: Any, error: type[Exception], message: str) -> None:
    t = torch.randn(1, 5, 2, 8)
    with pytest.raises(error, match=message):
        local_linear_attention(t, t, t, lam=1.0, cu_seqlens=cu_seqlens)
    with pytest.raises(error, match=message):
        probe_attention(t, t, t, t, cu_seqlens=cu_seqlens)


def test_packing_needs_one_batch_and_equal_lengths() -> None:
    t = torch.randn(2, 5, 2, 8)
    with pytest.raises(ValueError, match="cu_seqlens needs a batch of 1, got 2"):
        local_linear_attention(t, t, t, lam=1.0, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="cu_seqlens needs as many keys as queries, got 5 and 3"):
        local_linear_attention(t[:1, :3], t[:1], t[:1], lam=1.0, cu_seqlens=torch.tensor([0, 3]))
