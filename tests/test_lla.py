"""Local linear attention against its definition: values, gradients, solver, decoding, framework contract."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import nearfield
import pytest
import torch
from compare import assert_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from nearfield.lla import SolveInfo, local_linear_attention, local_linear_attention_step, probe_attention
from nearfield.lla import reference as ref
from torch import Tensor

ops = torch.ops.nearfield
F64 = torch.float64
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Conjugate gradients converged to the precision of the type: what remains is rounding, as in a direct solve.
CONVERGED: dict[torch.dtype, dict[str, Any]] = {
    torch.float64: {"tol": 1e-14, "max_iters": 1000},
    torch.float32: {"tol": 1e-7, "max_iters": 300},
    torch.bfloat16: {"tol": 1e-6, "max_iters": 300},
    torch.float16: {"tol": 1e-6, "max_iters": 300},
}


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Case(NamedTuple):
    B: int = 1
    m: int = 70
    n: int = 70
    Hq: int = 2
    Hk: int = 2
    d: int = 16
    dv: int = 16
    is_causal: bool = True
    window: int | None = None

    def __str__(self) -> str:
        length = f"T{self.n}" if self.m == self.n else f"M{self.m}-N{self.n}"
        heads = f"H{self.Hq}" if self.Hq == self.Hk else f"H{self.Hq}/{self.Hk}"
        mask = "causal" if self.is_causal else "full"
        window = f"-w{self.window}" if self.window else ""
        return (
            f"B{self.B}-{length}-{heads}-D{self.d}"
            + (f"/{self.dv}" if self.dv != self.d else "")
            + f"-{mask}{window}"
        )

    @property
    def mask(self) -> dict[str, Any]:
        return {"is_causal": self.is_causal, "window": self.window}


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


# --- inputs ----------------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float

    def cast(self, dtype: torch.dtype) -> Inputs:
        return Inputs(self.q.to(dtype), self.k.to(dtype), self.v.to(dtype), self.scale)


def draw(case: Case) -> Inputs:
    q = torch.randn(case.B, case.m, case.Hq, case.d, dtype=F64)
    k = torch.randn(case.B, case.n, case.Hk, case.d, dtype=F64)
    v = torch.randn(case.B, case.n, case.Hk, case.dv, dtype=F64)
    return Inputs(q, k, v, case.d**-0.5)


def rope(n: int, d: int) -> Inputs:
    """Slowly moving latents with a power-law spectrum and a common offset, then rotary positions."""
    latent = torch.zeros(n, d, dtype=F64)
    for t in range(n):
        latent[t] = 0.95 * latent[t - 1] + 0.31 * torch.randn(d, dtype=F64)
    spectrum = torch.arange(1, d + 1, dtype=F64) ** -0.75
    spectrum = spectrum / spectrum.pow(2).mean().sqrt()
    basis = torch.linalg.qr(torch.randn(d, d, dtype=F64))[0]
    k = (latent * spectrum) @ basis + 0.7 * torch.randn(1, d, dtype=F64)
    q = 1.3 * (0.8 * k + 0.2 * k @ torch.linalg.qr(torch.randn(d, d, dtype=F64))[0])
    angle = torch.arange(n, dtype=F64)[:, None] * 10000.0 ** (-torch.arange(0, d, 2, dtype=F64) / d)

    def rotate(z: Tensor) -> Tensor:
        a, b = z[:, ::2], z[:, 1::2]
        return torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], 2).flatten(
            1
        )

    v = torch.randn(n, d, dtype=F64)
    return Inputs(rotate(q)[None, :, None], rotate(k)[None, :, None], v[None, :, None], d**-0.5)


def cluster(n: int, d: int) -> Inputs:
    """Tight clusters of keys, queries near a centre, sharp logits."""
    centres = torch.randn(8, d, dtype=F64)
    pick = lambda: centres[torch.randint(8, (n,))] + 0.15 * torch.randn(n, d, dtype=F64)  # noqa: E731
    return Inputs(
        1.5 * pick()[None, :, None], pick()[None, :, None], torch.randn(1, n, 1, d, dtype=F64), d**-0.5
    )


def plain(n: int, d: int) -> Inputs:
    return draw(Case(m=n, n=n, Hq=1, Hk=1, d=d, dv=d))


def offset(n: int, d: int) -> Inputs:
    inputs = plain(n, d)
    return inputs._replace(k=inputs.k + 16)


def equal_keys(n: int, d: int) -> Inputs:
    inputs = plain(n, d)
    return inputs._replace(k=inputs.k[:, :1].expand_as(inputs.k).clone())


def one_hot(n: int, d: int) -> Inputs:
    return plain(n, d)._replace(scale=60.0)


def huge_logits(n: int, d: int) -> Inputs:
    """Logits of +-1000 and more: exp without the row maximum would overflow."""
    return plain(n, d)._replace(scale=1000 / d**0.5)


HOSTILE: dict[str, tuple[Callable[[int, int], Inputs], int, int]] = {
    "rope": (rope, 150, 32),
    "cluster": (cluster, 150, 32),
    "offset16": (offset, 100, 32),
    "equal-keys": (equal_keys, 80, 16),
    "one-hot": (one_hot, 80, 16),
    "logits-1000": (huge_logits, 80, 16),
    "fewer-keys-than-dims": (plain, 20, 32),
    "keys-dims-minus-1": (plain, 31, 32),
    "keys-as-dims": (plain, 32, 32),
    "keys-dims-plus-1": (plain, 33, 32),
}

LAMS: dict[str, Callable[[Case], Tensor]] = {
    "scalar": lambda c: torch.tensor(0.7, dtype=F64),
    "head": lambda c: 0.3 + torch.rand(c.Hq, dtype=F64),
    "channel": lambda c: 0.3 + torch.rand(c.Hq, c.d, dtype=F64),
    "token": lambda c: 0.3 + torch.rand(c.B, c.m, c.Hq, dtype=F64),
}


# --- comparison ------------------------------------------------------------------------------------------

NAMES = ("o", "dq", "dk", "dv", "dlam")
# Axes of the ridge per row [B, m, Hq, 1 or d] that a lam with so many dimensions shares.
SHARED_AXES = {0: (0, 1, 2, 3), 1: (0, 1, 3), 2: (0, 1), 3: (3,)}


def with_gradients(f: Callable[..., Tensor], tensors: tuple[Tensor, ...], d_o: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = f(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_o.to(out.dtype))]


def in_order(
    f: Callable[..., Tensor], tensors: tuple[Tensor, ...], d_o: Tensor, order: Tensor, keys: Tensor
) -> list[Tensor]:
    """The same with the features (of q, k and a ridge per channel) and the keys in another order, put back in the results."""
    q, k, v, lam = tensors
    per_channel = lam.ndim in (2, 4) and lam.shape[-1] == len(order)
    permuted = (q[..., order], k[:, keys][..., order], v[:, keys], lam[..., order] if per_channel else lam)
    o, dq, dk, dv, dlam = with_gradients(f, permuted, d_o)
    back, place = order.argsort(), keys.argsort()
    return [o, dq[..., back], dk[:, place][..., back], dv[:, place], dlam[..., back] if per_channel else dlam]


def term_size(inputs: Inputs, d_o: Tensor, lam: Tensor) -> float:
    """Size of the terms of dq, dk and dlam; where all visible keys are one they cancel to rounding."""
    if not inputs.k.numel() or not d_o.numel():
        return 0.0
    sizes = [float(t.abs().max()) for t in (d_o, inputs.v, inputs.q, inputs.k)]
    return math.prod(sizes) * max(1.0, 1 / float(lam.min()))


def check_attention(inputs: Inputs, lam: Tensor, dtype: torch.dtype, **options: Any) -> None:
    """Output and all gradients of the operator against the definition in float64 on the rounded inputs.

    The yardstick is the direct solve in the computation's dtype, rounded to the input's: torch.linalg has no
    16-bit solver, and the operator computes in float32 as well.
    """
    work = F64 if dtype == F64 else torch.float32
    rounded = inputs.cast(dtype)
    lam = lam.to(work)
    d_o = torch.randn(*inputs.q.shape[:3], inputs.v.shape[-1], dtype=F64).to(dtype)

    def definition(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
        return ref.local_linear_attention(q, k, v, lam=lam, scale=inputs.scale, **options)[0]

    def operator(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
        return local_linear_attention(q, k, v, lam=lam, scale=inputs.scale, **options, **CONVERGED[dtype])

    exact, direct = rounded.cast(F64), rounded.cast(work)
    axes = SHARED_AXES[lam.ndim]
    truth = with_gradients(definition, (*exact[:3], ref.ridge_per_row(lam, exact.q)), d_o)
    # The gradient of a shared lam is a sum over rows that cancels: its unit is the sum of absolute values.
    unit = float(truth[4].abs().sum(axes).max()) if truth[4].numel() else 0.0
    truth[4] = truth[4].sum(axes)
    # On one BLAS or another a single result may be exact by luck: three orders of summation make three results.
    features, keys = exact.q.shape[-1], exact.k.shape[1]
    any_order = options.get("is_causal") is False and options.get("window") is None
    any_order &= options.get("cu_seqlens") is None
    shuffled = [
        (torch.randperm(features), torch.randperm(keys) if any_order else torch.arange(keys))
        for _ in range(2)
    ]
    eager = [
        in_order(definition, (*direct[:3], lam), d_o, *orders)
        for orders in [(torch.arange(features), torch.arange(keys)), *shuffled]
    ]
    got = with_gradients(operator, (*rounded[:3], lam), d_o)
    terms = term_size(exact, d_o, lam)
    for name, g, t, e in zip(NAMES, got, truth, zip(*eager, strict=True), strict=True):
        scale = unit if name == "dlam" else 0.0
        if name in ("dq", "dk", "dlam") and t.numel() and float(t.abs().max()) < 1e-12 * terms:
            scale = terms
        assert_accurate(name, g, t, [x.to(g.dtype) for x in e], scale=scale)


# --- values and gradients --------------------------------------------------------------------------------


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


# --- packed sequences ------------------------------------------------------------------------------------

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


# --- the reference itself --------------------------------------------------------------------------------


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


# --- exact rows and limits -------------------------------------------------------------------------------


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


# --- the solver's contract -------------------------------------------------------------------------------


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


def drift_task(seed: int, d: int = 32, length: int = 256, segments: int = 4) -> tuple[Inputs, Tensor]:
    """Segments in time, each with its own cone of unit keys and its own linear map from keys to values."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=F64)  # noqa: E731
    unit = lambda t: t / t.norm(dim=1, keepdim=True)  # noqa: E731
    segment = torch.arange(length * segments) // length
    centre = unit(normal(segments, d))
    k, q = (unit(centre[segment] + 0.5 * normal(length * segments, d) / d**0.5) for _ in range(2))
    maps = normal(segments, d, d)
    value = lambda t: torch.einsum("nd,nde->ne", t, maps[segment])  # noqa: E731
    noisy = value(k) + 0.05 * normal(length * segments, d)
    return Inputs(q[None, :, None], k[None, :, None], noisy[None, :, None], 32.0), value(q)


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


# --- decoding --------------------------------------------------------------------------------------------


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


# --- memory layout, threads, memory ----------------------------------------------------------------------


def layouts(t: Tensor) -> list[Tensor]:
    """The same values with other strides: heads before tokens, padded rows, a last dimension not dense."""
    padded = torch.full((*t.shape[:3], t.shape[3] + 5), math.nan, dtype=t.dtype)
    padded[..., : t.shape[3]] = t
    return [
        t.transpose(1, 2).contiguous().transpose(1, 2),
        padded[..., : t.shape[3]],
        t.transpose(2, 3).contiguous().transpose(2, 3),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_strided_inputs(dtype: torch.dtype) -> None:
    q, k, v, _ = draw(Case(B=2, m=40, n=70, Hq=4, Hk=2)).cast(dtype)
    x = torch.randn_like(q)
    d_o = torch.randn_like(q)
    calls: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (lambda q, k, v: local_linear_attention(q, k, v, lam=0.5), (q, k, v)),
        (probe_attention, (q, x, k, v)),
    ]
    for f, tensors in calls:
        want = with_gradients(f, tensors, d_o)
        for strided in zip(*(layouts(t) for t in (*tensors, d_o)), strict=True):
            leaves = [t.requires_grad_() for t in strided[:-1]]
            out = f(*leaves)
            for a, b in zip(want, [out, *torch.autograd.grad(out, leaves, strided[-1])], strict=True):
                assert torch.equal(a, b)


def test_expanded_incoming_gradient() -> None:
    inputs = draw(Case())
    f = lambda q, k, v: local_linear_attention(q, k, v, lam=0.5)  # noqa: E731
    leaves = [t.requires_grad_() for t in inputs[:3]]
    f(*leaves).sum().backward()
    want = with_gradients(f, inputs[:3], torch.ones_like(inputs.v))
    for leaf, b in zip(leaves, want[1:], strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, b)


def test_deterministic_for_any_number_of_threads() -> None:
    inputs = draw(Case(B=2, m=150, n=200, Hq=4, Hk=2)).cast(torch.float32)
    lam = torch.full((4, 16), 0.3)
    d_o = torch.randn_like(inputs.q)

    def run() -> list[Tensor]:
        f = lambda q, k, v, lam: local_linear_attention(q, k, v, lam=lam)  # noqa: E731
        step = local_linear_attention_step(inputs.q[:, :2], *inputs[1:3], lam=lam)
        return [*with_gradients(f, (*inputs[:3], lam), d_o), step]

    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for a, b in zip(results[0], result, strict=True):
            assert torch.equal(a, b)


def test_memory_is_linear_in_the_length() -> None:
    """8192 queries and keys: one 8192 x 8192 float32 buffer would be 256 MiB."""
    script = """
import resource, torch
from nearfield import local_linear_attention
torch.set_num_threads(1)
def run(n):
    leaves = [torch.randn(1, n, 1, 8, requires_grad=True) for _ in range(3)]
    local_linear_attention(*leaves, lam=1.0, max_iters=2).sum().backward()
run(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(8192)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64, f"peak memory grew by {done.stdout.strip()} MiB"


# --- bad input -------------------------------------------------------------------------------------------

Q, K, V = torch.randn(2, 5, 4, 8), torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, 6)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"q": Q[0]}, ValueError, r"q has shape \[5, 4, 8\]"),
        ({"q": Q[..., :0]}, ValueError, r"q has shape \[2, 5, 4, 0\]"),
        ({"k": K[..., :4]}, ValueError, r"k has shape \[2, 7, 2, 4\]"),
        ({"k": K[:1]}, ValueError, r"k has shape \[1, 7, 2, 8\]"),
        ({"v": V[:, :3]}, ValueError, r"v has shape \[2, 3, 2, 6\]"),
        ({"v": V[:, :, :1]}, ValueError, r"v has shape \[2, 7, 1, 6\]"),
        ({"q": Q[:, :, :3]}, ValueError, "q has 3 heads, expected a multiple of the 2"),
        ({"k": K.double()}, ValueError, "k has dtype torch.float64, but q has torch.float32"),
        ({"q": Q.int(), "k": K.int(), "v": V.int()}, NotImplementedError, "q has dtype torch.int32"),
        ({"k": [1.0]}, TypeError, "k must be a torch.Tensor, got list"),
        ({"v": V.to("meta")}, ValueError, "v is on meta, but q is on cpu"),
        ({"q": Q.to_sparse()}, NotImplementedError, "q is a sparse"),
        ({"lam": 0.0}, ValueError, "lam is 0.0, expected a finite number > 0"),
        ({"lam": -1}, ValueError, "lam is -1"),
        ({"lam": math.inf}, ValueError, "lam is inf"),
        ({"lam": math.nan}, ValueError, "lam is nan"),
        ({"lam": "big"}, TypeError, "lam must be a float or a torch.Tensor, got str"),
        ({"lam": torch.ones(3)}, ValueError, r"lam has shape \[3\], expected \[\], \[4\] per head"),
        ({"lam": torch.ones(8, 4)}, ValueError, r"lam has shape \[8, 4\]"),
        ({"lam": torch.ones(2, 4, 5)}, ValueError, r"lam has shape \[2, 4, 5\]"),
        ({"lam": torch.ones((), dtype=torch.int64)}, NotImplementedError, "lam has dtype torch.int64"),
        ({"lam": torch.ones((), device="meta")}, ValueError, "lam is on meta, but q is on cpu"),
        ({"scale": "1"}, TypeError, "scale must be a float, got str"),
        ({"scale": math.nan}, ValueError, "scale is nan"),
        ({"window": 0}, ValueError, "window is 0"),
        ({"window": 2.5}, ValueError, "window is 2.5"),
        ({"tol": -1.0}, ValueError, "tol is -1.0"),
        ({"tol": math.nan}, ValueError, "tol is nan"),
        ({"max_iters": 0}, ValueError, "max_iters is 0"),
        ({"max_iters": 3.5}, ValueError, "max_iters is 3.5"),
        ({"ridge": "both"}, ValueError, "ridge is 'both', expected 'relative' or 'absolute'"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"q": Q, "k": K, "v": V, "lam": 1.0} | changes
    with pytest.raises(error, match="local_linear_attention: " + message):
        local_linear_attention(**arguments)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (
            {"x": Q[..., :4]},
            ValueError,
            r"x has shape \[2, 5, 4, 4\], expected the shape of q, \[2, 5, 4, 8\]",
        ),
        ({"x": Q.int()}, NotImplementedError, "x has dtype torch.int32"),
        ({"x": 1.0}, TypeError, "x must be a torch.Tensor, got float"),
        ({"window": -1}, ValueError, "window is -1"),
    ],
)
def test_bad_probe_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="probe_attention: " + message):
        probe_attention(**({"q": Q, "x": Q, "k": K, "v": V} | changes))


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"k_cache": K[:1]}, ValueError, r"k_cache has shape \[1, 7, 2, 8\]"),
        ({"v_cache": V[:, 1:]}, ValueError, r"v_cache has shape \[2, 6, 2, 6\]"),
        ({"cache_seqlens": torch.ones(3, dtype=torch.int32)}, ValueError, r"cache_seqlens has shape \[3\]"),
        ({"cache_seqlens": torch.ones(2)}, ValueError, "cache_seqlens has dtype torch.float32"),
        ({"cache_seqlens": [1, 2]}, TypeError, "cache_seqlens must be a torch.Tensor, got list"),
        ({"lam": torch.ones(5)}, ValueError, r"lam has shape \[5\]"),
    ],
)
def test_bad_step_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="local_linear_attention_step: " + message):
        local_linear_attention_step(**({"q": Q, "k_cache": K, "v_cache": V, "lam": 1.0} | changes))


@pytest.mark.parametrize("length", [-1, 8])
def test_cache_length_outside_the_cache(length: int) -> None:
    with pytest.raises(RuntimeError, match=rf"cache_seqlens\[1\] is {length}, expected 0 to 7"):
        local_linear_attention_step(Q, K, V, lam=1.0, cache_seqlens=torch.tensor([7, length]))


def test_direct_calls_are_checked_too() -> None:
    lam = torch.ones(2, 5, 4, 1)
    good = (Q, K, V, lam, None, 1.0, True, None, False, 1e-3, 8)
    o, x, kbar, lse, _, _ = ops.lla_fwd(*good)
    for at, bad, message in [
        (0, Q[0], "q has shape"),
        (1, K[:1], "k has shape"),
        (2, V[:, :2], "v has shape"),
        (2, V.double(), "v has dtype"),
        (3, lam[..., 0], "lam has shape"),
        (3, lam.expand(2, 5, 4, 3), "lam has 3 channels"),
        (3, lam.double(), "lam has dtype"),
        (4, torch.tensor([0, 5]), "cu_seqlens needs a batch of 1, got 2"),
        (4, torch.zeros(2), "cu_seqlens has dtype"),
        (7, 0, "window is 0"),
    ]:
        with pytest.raises(RuntimeError, match=f"lla_fwd: {message}"):
            ops.lla_fwd(*good[:at], bad, *good[at + 1 :])
    saved = (o, Q, K, V, lam, x, kbar, lse)
    for at, name in [(0, "d_o"), (5, "x"), (6, "kbar"), (7, "lse")]:
        with pytest.raises(RuntimeError, match=f"lla_bwd: {name} has shape"):
            ops.lla_bwd(*saved[:at], saved[at][:, :2], *saved[at + 1 :], *good[4:])
    with pytest.raises(RuntimeError, match="lla_probe_fwd: x has shape"):
        ops.lla_probe_fwd(Q, x[:, :2], K, V, None, 1.0, True, None)


# --- framework contract ----------------------------------------------------------------------------------


def test_public_names() -> None:
    assert {"local_linear_attention", "local_linear_attention_step", "probe_attention"} <= set(
        nearfield.__all__
    )
    assert nearfield.local_linear_attention is local_linear_attention


@pytest.mark.parametrize("dtype", [F64, torch.bfloat16], ids=dtype_id)
def test_opcheck(dtype: torch.dtype) -> None:
    work = F64 if dtype == F64 else torch.float32
    inputs = draw(Case(B=2, m=10, n=20, Hq=4, Hk=2, d=8, dv=6)).cast(dtype)
    q, k, v = (t.requires_grad_() for t in inputs[:3])
    lam = torch.full((2, 10, 4, 1), 0.5, dtype=work, requires_grad=True)
    x = torch.randn(2, 10, 4, 8, dtype=work, requires_grad=True)
    mask = (None, 0.3, True, None)
    solver = (*mask, False, 1e-3, 8)
    torch.library.opcheck(ops.lla_fwd.default, (q, k, v, lam, *solver))
    torch.library.opcheck(ops.lla_probe_fwd.default, (q, x, k, v, *mask))
    with torch.no_grad():
        o, x, kbar, lse, _, _ = ops.lla_fwd(q, k, v, lam, *solver)
        d_o, q, k, v, lam = (torch.randn_like(o), *(t.detach() for t in (q, k, v, lam)))
        torch.library.opcheck(ops.lla_bwd.default, (d_o, q, k, v, lam, x, kbar, lse, *solver))
        torch.library.opcheck(ops.lla_probe_bwd.default, (d_o, q, x, k, v, kbar, lse, *mask))
        packed = (d_o[:1], q[:1], k[:1, :10], v[:1, :10])
        rest = (x[:1], kbar[:1], lse[:1], torch.tensor([0, 3, 8]), *solver[1:])
        torch.library.opcheck(ops.lla_bwd.default, (*packed, lam[:1], *rest))
        torch.library.opcheck(ops.lla_step.default, (q, k, v, torch.tensor([20, 5]), lam, 0.3, 7, False))


def test_second_derivatives_are_refused() -> None:
    q, k, v = (t.requires_grad_() for t in draw(Case(m=20, n=20))[:3])
    for o in (local_linear_attention(q, k, v, lam=1.0), probe_attention(q, q, k, v)):
        (dq,) = torch.autograd.grad(o.sum(), q, create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivatives"):
            torch.autograd.grad(dq.sum(), q)


def test_meta_tensors() -> None:
    q, k, v = (t.to("meta") for t in draw(Case(B=2, m=10, n=20, Hq=4, Hk=2, dv=6))[:3])
    assert local_linear_attention(q, k, v, lam=1.0).shape == (2, 10, 4, 6)
    assert probe_attention(q, q, k, v).shape == (2, 10, 4, 6)
    assert local_linear_attention_step(q, k, v, lam=1.0).shape == (2, 10, 4, 6)


def compiled_module(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    o, aux = local_linear_attention(q, k, v, lam=lam, window=9, return_aux=True)
    return probe_attention(q, o * 0.5, k, v) + local_linear_attention(q, k, v, lam=0.5), aux.iterations


@pytest.mark.parametrize("backend, dynamic", [("aot_eager", False), ("aot_eager", True), ("inductor", False)])
def test_compile(backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    f = torch.compile(compiled_module, fullgraph=True, backend=backend, dynamic=dynamic)
    for m in (12, 17) if dynamic else (12,):
        inputs = draw(Case(m=m, n=20, d=8, dv=8)).cast(torch.float32)
        leaves = (*inputs[:3], torch.rand(2, 8) + 0.3)
        d_o = torch.randn(1, m, 2, 8)
        want = with_gradients(lambda *t: compiled_module(*t)[0], leaves, d_o)
        got = with_gradients(lambda *t: f(*t)[0], leaves, d_o)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_compile_with_symbolic_options() -> None:
    """Under dynamic=True python numbers become symbols too."""
    torch._dynamo.reset()

    def f(t: Tensor, lam: float, scale: float, window: int, max_iters: int) -> Tensor:
        return local_linear_attention(t, t, t, lam=lam, scale=scale, window=window, max_iters=max_iters)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    for n, lam, scale, window, max_iters in (
        (20, 0.5, 0.3, 5, 8),
        (24, 0.7, 0.4, 7, 9),
        (30, 1.5, 1.0, 40, 3),
    ):
        t = torch.randn(1, n, 2, 8)
        assert torch.equal(compiled(t, lam, scale, window, max_iters), f(t, lam, scale, window, max_iters))


def test_compile_step() -> None:
    torch._dynamo.reset()
    step = torch.compile(local_linear_attention_step, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (20, 33):
        q, k, v, _ = draw(Case(B=2, m=1, n=n)).cast(torch.float32)
        options = {"lam": 0.5, "cache_seqlens": torch.tensor([n, 4]), "window": 8}
        assert torch.equal(step(q, k, v, **options), local_linear_attention_step(q, k, v, **options))


def test_autocast() -> None:
    inputs = draw(Case(m=20, n=20)).cast(torch.float32)
    leaves = [t.requires_grad_() for t in (*inputs[:3], torch.tensor(0.5))]
    with torch.autocast("cpu", torch.bfloat16):
        o = local_linear_attention(*leaves[:3], lam=leaves[3])
        probed = probe_attention(leaves[0], leaves[0], *leaves[1:3])
        with torch.no_grad():
            step = local_linear_attention_step(*leaves[:3], lam=leaves[3])
    assert o.dtype == probed.dtype == step.dtype == torch.bfloat16
    half = [t.detach().bfloat16() for t in leaves[:3]]
    assert torch.equal(o, local_linear_attention(*half, lam=leaves[3].detach()))
    grads = torch.autograd.grad(o, leaves, torch.ones_like(o))
    assert [g.dtype for g in grads] == [torch.float32] * 4


def test_only_some_inputs_require_grad() -> None:
    inputs = draw(Case(m=20, n=20))
    lam = torch.tensor(0.5, dtype=F64)
    f = lambda q, k, v, lam: local_linear_attention(q, k, v, lam=lam)  # noqa: E731
    d_o = torch.randn_like(inputs.v)
    want = with_gradients(f, (*inputs[:3], lam), d_o)
    assert not f(*inputs[:3], lam).requires_grad
    for at in range(4):
        tensors = [t.clone() for t in (*inputs[:3], lam)]
        tensors[at].requires_grad_()
        assert torch.equal(torch.autograd.grad(f(*tensors), tensors[at], d_o)[0], want[at + 1])
    with torch.no_grad():
        assert torch.equal(f(*inputs[:3], lam), want[0])


def test_statistics_are_not_differentiable() -> None:
    inputs = draw(Case(m=20, n=20))
    q, k, v = (t.requires_grad_() for t in inputs[:3])
    o, aux = local_linear_attention(q, k, v, lam=0.5, return_aux=True)
    assert o.requires_grad
    assert not aux.lse.requires_grad
    assert not aux.ratio.requires_grad
    s = torch.einsum("bihd,bjhd->bihj", q, k).detach() * inputs.scale
    mask = ref.visible_keys(20, 20, is_causal=True, window=None)
    torch.testing.assert_close(aux.lse, s.masked_fill(~mask[None, :, None], -math.inf).logsumexp(-1))
