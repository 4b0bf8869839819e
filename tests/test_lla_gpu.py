"""Local linear attention on CUDA: values and gradients against the float64 direct solve, solver, framework contract."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import assert_accurate
from lla_cases import (
    F64,
    HOSTILE,
    LAMS,
    NAMES,
    SHARED_AXES,
    Case,
    Inputs,
    cluster,
    draw,
    drift_task,
    dtype_id,
    offset,
    plain,
    rope,
    term_size,
    with_gradients,
)
from nearfield import explain, lla
from nearfield.lla import local_linear_attention, probe_attention
from nearfield.lla import reference as ref
from torch import Tensor, nn

pytestmark = pytest.mark.gpu

ops = torch.ops.nearfield


@pytest.fixture(autouse=True, params=["hopper", "portable"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs on both paths: calls with CUDA tensors ask for one."""

    def asking(f: Callable[..., Any]) -> Callable[..., Any]:
        def call(q: Tensor, *args: Any, **kwargs: Any) -> Any:
            return f(q, *args, **{"backend": request.param} if q.is_cuda else {}, **kwargs)

        return call

    for f in (local_linear_attention, probe_attention):
        monkeypatch.setitem(globals(), f.__name__, asking(f))
    name: str = request.param
    return name


def portable_only(backend: str) -> None:
    if backend != "portable":
        pytest.skip("the Hopper path refuses these")


DTYPES = [torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
CONVERGED: dict[str, Any] = {"tol": 1e-4, "max_iters": 300}

# Relative Frobenius errors that the method promises with fp16 operands and 16-bit results, by the ridge in units of
# the keys' variance (csrc/lla/README.md, "On Hopper"). A bfloat16 result alone has 1.7e-3.
GRADIENT_BOUNDS = {"dq": 4e-3, "dk": 6e-3, "dv": 6e-3, "dx": 4e-3, "dlam": 3e-3}


FLOAT32_BOUND = 5e-4  # with float32 operands in 3xTF32 products


def bound(name: str, lam: float, dtype: torch.dtype = torch.float16) -> float:
    if dtype == torch.float32:
        return FLOAT32_BOUND
    return GRADIENT_BOUNDS[name] if name != "o" else 3e-3 if lam >= 0.99 else 6e-3


def cuda(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return Inputs(*(t.cuda().to(dtype) for t in inputs[:3]), inputs.scale)  # type: ignore[call-arg]


def assert_close(name: str, got: Tensor, truth: Tensor, allowed: float, scale: float = 0.0) -> None:
    """Frobenius error relative to the truth; elements relative to ``scale`` where the truth cancels to nothing."""
    assert got.shape == truth.shape
    assert got.isfinite().all(), f"{name}: {int((~got.isfinite()).sum())} values are NaN or infinite"
    if got.numel() == 0:
        return
    size = max(float(truth.norm()), scale * math.sqrt(truth.numel()))
    error = float((got.double() - truth).norm()) / max(size, 1e-300)
    assert error <= allowed, f"{name}: relative error {error:.2e} > {allowed:.0e}"


def share_of_rounding(
    exact: Inputs, d_o: Tensor, lam: float, operand: float, product: float
) -> dict[str, float]:
    """The most that rounding changes in dq and dk to first order, relative to them; one causal head.

    ``operand`` is the unit to which weights and rows are rounded where they enter a product: the weights of both
    solves and of h, y in the slopes, dS; ``product`` that of q.k, in units of the sum of absolute terms. Small beside
    the bounds unless the fit leaves little of Gam in r = Gam - Gbar - (k - kbar).y, lam of lam + C.
    """
    q, k, v = (t[0, :, 0] for t in exact[:3])
    hidden = ~torch.ones(len(q), len(k), device=q.device).tril().bool()
    terms, rows = q.abs() @ k.abs().mT * abs(exact.scale), d_o[0, :, 0].double()

    def gradients(e: list[Tensor]) -> tuple[Tensor, Tensor]:
        p = (q @ k.mT * exact.scale + product * e[0] * terms).masked_fill(hidden, -math.inf).softmax(1)
        mean = p @ k
        centred, gam = k - mean[:, None], rows @ v.mT
        gam = gam - (p * gam).sum(1, keepdim=True)
        slopes = lambda x: torch.einsum("ijc,ic->ij", centred, x)  # noqa: E731

        def solve(weights: Tensor, b: Tensor) -> Tensor:
            covariance = torch.einsum("ij,ijc,ije->ice", weights, centred, centred)
            return torch.linalg.solve(covariance + lam * torch.eye(k.shape[1], device=q.device), b)

        x = solve(p * (1 + operand * e[1]), q - mean)
        h = torch.einsum("ij,ijc->ic", p * gam * (1 + operand * e[2]), centred)
        y = solve(p * (1 + operand * e[3]), h)
        r, a = gam - slopes(y * (1 + operand * e[5])), 1 + slopes(x)
        ds = p * a * r
        ds = exact.scale * (ds - p * ds.sum(1, keepdim=True)) * (1 + operand * e[4])
        return torch.einsum("ij,ijc->ic", ds, centred) + y, ds.mT @ q + (p * r).mT @ x - (p * a).mT @ y

    still = [torch.zeros(len(q), len(k), dtype=F64, device=q.device) for _ in range(5)] + [
        torch.zeros_like(q)
    ]
    shares = {}
    for i, (name, want) in enumerate(zip(("dq", "dk"), gradients(still), strict=True)):
        change, largest = torch.randn_like(want), 0.0
        for _ in range(6):  # the signs that carry furthest along the change that the last signs made
            e = [t.clone().requires_grad_() for t in still]
            slope = torch.autograd.grad((change * gradients(e)[i]).sum(), e)
            change = gradients([g.sign() for g in slope])[i] - want
            largest = max(largest, float(change.norm() / want.norm()))
        shares[name] = largest
    return shares


def check_attention(
    inputs: Inputs,
    lam: Tensor,
    dtype: torch.dtype,
    solver: dict[str, Any] = CONVERGED,
    sensitive: bool = False,
    padded: int = 0,
    **options: Any,
) -> None:
    """``padded``: the operator gets the one sequence in front of so many tokens, of which Hopper does not keep the
    weights."""
    rounded = cuda(inputs, dtype)
    lam = lam.cuda().float()
    d_o = torch.randn(*rounded.q.shape[:3], rounded.v.shape[-1], device="cuda").to(dtype)

    def definition(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
        return ref.local_linear_attention(q, k, v, lam=lam, scale=inputs.scale, **options)[0]

    def operator(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
        if not padded:
            return local_linear_attention(q, k, v, lam=lam, scale=inputs.scale, **options, **solver)
        length = q.shape[1]
        bounds = torch.tensor([0, length], device="cuda")
        q, k, v = (nn.functional.pad(t, (0, 0, 0, 0, 0, padded - length)) for t in (q, k, v))
        lam = nn.functional.pad(lam, (0, 0, 0, padded - length), value=1.0)
        o = local_linear_attention(
            q, k, v, lam=lam, scale=inputs.scale, cu_seqlens=bounds, **options, **solver
        )
        return o[:, :length]

    exact = rounded.cast(F64)
    truth = with_gradients(definition, (*exact[:3], ref.ridge_per_row(lam.double(), exact.q)), d_o)
    # The gradient of a shared lam is a sum over rows that cancels: its unit is the sum of absolute values.
    axes = SHARED_AXES[lam.ndim]
    unit = float(truth[4].abs().sum(axes).max()) if truth[4].numel() else 0.0
    truth[4] = truth[4].sum(axes)
    got = with_gradients(operator, (*rounded[:3], lam), d_o)
    eager = None
    if dtype == torch.float32:  # the inputs are exact: what PyTorch loses in float32 may be lost twice
        eager = with_gradients(definition, (*rounded[:3], ref.ridge_per_row(lam, rounded.q)), d_o)
        eager[4] = eager[4].sum(axes)
    terms = term_size(exact, d_o, lam)
    # Operands of 16-bit products are fp16. 3xTF32 leaves out the products of low halves, and tensor cores truncate.
    units = (2.0**-21, 2.0**-21) if dtype == torch.float32 else (2.0**-11, 0.0)
    shares = share_of_rounding(exact, d_o, float(lam.min()), *units) if sensitive else {}
    for name, g, t in zip(NAMES, got, truth, strict=True):
        scale = {"dlam": unit, "dq": 1e-3 * terms, "dk": 1e-3 * terms}.get(name, 0.0)
        if name == "dlam" and unit < 1e-12 * terms:  # one distinct key: nothing but rounding
            scale = 1e-3 * terms
        allowed = bound(name, float(lam.min()), dtype)
        allowed += shares.get(name, 0.0)
        if eager is not None:
            lost = eager[NAMES.index(name)].double() - t
            allowed = max(allowed, 2 * float(lost.norm() / t.norm().clamp_min(1e-300)))
        assert_close(name, g, t, allowed, scale)


def check_probe(case: Case, dtype: torch.dtype, of_x: torch.dtype = torch.float32) -> None:
    q, k, v, scale = cuda(draw(case), dtype)
    x = torch.randn(q.shape, device="cuda").to(of_x)
    d_o = torch.randn(*q.shape[:3], case.dv, device="cuda").to(dtype)
    truth = with_gradients(
        lambda *t: ref.probe_attention(*t, scale=scale, **case.mask),
        tuple(t.to(F64) for t in (q, x, k, v)), d_o,
    )  # fmt: skip
    got = with_gradients(lambda *t: probe_attention(*t, scale=scale, **case.mask), (q, x, k, v), d_o)
    for name, g, t in zip(("o", "dq", "dx", "dk", "dv"), got, truth, strict=True):
        assert_close(name, g, t, bound(name, 1.0, dtype))


CASES = [
    Case(B=2, m=1, n=1, d=8, dv=8),
    Case(m=64, n=64, Hq=1, Hk=1, d=64, dv=64),
    Case(m=65, n=129, Hq=4, Hk=2, d=32, dv=32),
    Case(m=500, n=500, d=64, dv=64),
    Case(m=300, n=300, d=128, dv=128),
    Case(B=2, m=200, n=257, Hq=4, Hk=2, d=48, dv=40),
    Case(m=200, n=200, Hq=2, Hk=2, d=32, dv=128),
    Case(m=300, n=300, Hq=6, Hk=2, d=128, dv=64, is_causal=False),
    Case(B=8, m=300, n=300, Hq=16, Hk=8, d=64, dv=64),  # more than one CTA per SM
    Case(m=5, n=400, Hq=2, Hk=1, d=64, dv=64, is_causal=False),
    Case(B=4, m=1, n=300, Hq=4, Hk=2, d=64, dv=64),
    Case(m=300, n=150, d=64, dv=64),  # the first queries see nothing
    Case(m=300, n=150, d=64, dv=64, is_causal=False, window=9),
    Case(m=400, n=400, d=64, dv=64, window=100, Hq=4, Hk=1),
    Case(m=300, n=500, d=128, dv=128, window=64),
    Case(m=200, n=450, d=32, dv=32, is_causal=False, window=201),
    Case(m=200, n=200, d=64, dv=64, window=1),
    # A tile of queries sees nine tiles of keys, whose weights Hopper keeps at d = 64, or ten.
    Case(m=700, n=700, d=64, dv=64, window=513, Hq=2, Hk=1),
    Case(m=700, n=700, d=64, dv=64, window=514, Hq=1, Hk=1),
    Case(m=640, n=640, d=32, dv=48, window=512, is_causal=False, Hq=1, Hk=1),
    Case(m=640, n=640, d=64, dv=64, window=515, is_causal=False, Hq=1, Hk=1),
    Case(m=500, n=710, d=64, dv=64, window=449, Hq=1, Hk=1),  # queries and keys 18 apart modulo 64
    Case(m=710, n=500, d=64, dv=64, Hq=1, Hk=1),
    Case(m=620, n=620, d=64, dv=64, Hq=2, Hk=1),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


# --- values and gradients --------------------------------------------------------------------------------


@each_dtype
@each_case
def test_matches_definition(case: Case, dtype: torch.dtype) -> None:
    check_attention(draw(case), torch.full((case.B, case.m, case.Hq), 1.0), dtype, **case.mask)


@each_dtype
@each_case
def test_probe_matches_definition(case: Case, dtype: torch.dtype) -> None:
    check_probe(case, dtype)


@each_dtype
@each_case
def test_probe_takes_a_slope_of_the_inputs_dtype(case: Case, dtype: torch.dtype) -> None:
    check_probe(case, dtype, of_x=dtype)


@each_dtype
def test_a_slope_of_16_bits_is_read_without_loss(dtype: torch.dtype, backend: str) -> None:
    q, k, v, scale = cuda(draw(Case(m=300, n=300, Hq=4, Hk=2, d=64, dv=64)), dtype)
    # Rows of very different size, elements of a row too, and rows beside each other in memory.
    size = 2.0 ** torch.randint(-9, 9, (*q.shape[:3], 1), device="cuda")
    spread = 2.0 ** -torch.randint(0, 12, q.shape, device="cuda").float()
    x = (torch.randn(q.shape, device="cuda") * size * spread).to(dtype)
    x = torch.stack([x, x.flip(-1)], -2)[..., 0, :]
    wide, narrow = (probe_attention(q, t, k, v, scale=scale) for t in (x.float(), x))
    exact = ref.probe_attention(*(t.to(F64) for t in (q, x, k, v)), scale=scale)
    lost, narrowed = (((t - exact).norm(dim=-1) / exact.norm(dim=-1)).mean() for t in (wide, narrow))
    assert narrowed <= 1.01 * lost
    if backend == "portable":
        assert torch.equal(narrow, wide)


@each_case
def test_float32(case: Case, backend: str) -> None:
    portable_only(backend)
    check_attention(draw(case), torch.full((case.B, case.m, case.Hq), 1.0), torch.float32, **case.mask)
    check_probe(case, torch.float32)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_inputs_in_float32(name: str, backend: str) -> None:
    portable_only(backend)
    make, n, d = HOSTILE[name]
    solver = {"tol": 1e-5, "max_iters": 300}
    check_attention(
        make(n, d), torch.full((1, n, 1), 0.1), torch.float32, solver, sensitive=name == "logits-1000"
    )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=dtype_id)
@pytest.mark.parametrize("d, dv", [(7, 5), (60, 33), (100, 127), (1, 128)])
def test_any_head_dim(d: int, dv: int, dtype: torch.dtype, backend: str) -> None:
    portable_only(backend)
    case = Case(m=130, n=170, Hq=4, Hk=2, d=d, dv=dv)
    check_attention(draw(case), torch.full((1, 130, 4), 1.0), dtype)
    check_probe(case, dtype)


@pytest.mark.parametrize("ridge", ["relative", "absolute"])
@pytest.mark.parametrize("mode", LAMS)
def test_every_ridge(mode: str, ridge: str) -> None:
    case = Case(B=2, m=150, n=170, Hq=4, Hk=2, d=32, dv=40)
    lam = LAMS[mode](case) * (400 if ridge == "absolute" else 1)
    check_attention(draw(case), lam, torch.float16, ridge=ridge)


@each_dtype
@pytest.mark.parametrize("lam", [10.0, 1.0, 0.1])
@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("padded", [0, 640], ids=["kept", "recomputed"])
def test_hostile_inputs(name: str, lam: float, dtype: torch.dtype, padded: int) -> None:
    make, n, d = HOSTILE[name]
    lams = torch.full((1, n, 1), lam)
    check_attention(make(n, d), lams, dtype, sensitive=name == "logits-1000", padded=padded)


def qknorm(n: int, d: int) -> Inputs:
    """RMS-normalised queries and keys, query gain 1.6."""
    inputs = plain(n, d)
    unit = lambda t: t / t.pow(2).mean(-1, keepdim=True).sqrt()  # noqa: E731
    return inputs._replace(q=1.6 * unit(inputs.q), k=unit(inputs.k))


@pytest.mark.parametrize("lam", [1.0, 0.1])
@pytest.mark.parametrize("length, d", [(420, 32), (420, 64), (580, 64), (420, 128)])
@pytest.mark.parametrize("make", [plain, qknorm, rope, cluster, offset], ids=lambda f: f.__name__)
def test_realistic_inputs(make: Callable[[int, int], Inputs], length: int, d: int, lam: float) -> None:
    check_attention(make(length, d), torch.tensor(lam), torch.bfloat16)


def test_100_random_problems() -> None:
    rng = random.Random(0)
    for _ in range(100):
        kv_heads = rng.randint(1, 2)
        case = Case(
            B=rng.randint(1, 2), m=rng.randint(1, 300), n=rng.randint(1, 300), Hq=kv_heads * rng.randint(1, 3),
            Hk=kv_heads, d=8 * rng.randint(1, 16), dv=8 * rng.randint(1, 16), is_causal=rng.random() < 0.6,
            window=rng.choice([None, None, rng.randint(1, 320)]),
        )  # fmt: skip
        dtype = rng.choice(DTYPES)
        inputs = draw(case)._replace(scale=rng.uniform(-1, 1) / case.d**0.5)
        check_attention(inputs, LAMS[rng.choice(list(LAMS))](case) + 0.7, dtype, **case.mask)
        check_probe(case, dtype)


def test_values_of_any_size() -> None:
    """One power of two per head brings every tensor into the range of fp16: no overflow, no loss."""
    case = Case(m=200, n=200, Hq=2, Hk=2, d=64, dv=64)
    q, k, v, scale = draw(case)
    size = torch.tensor([1e-6, 1e6], dtype=F64)[:, None]
    inputs = Inputs(q * 30, k * size, v / size, scale / 1e3)
    lam = torch.tensor([1e-12, 1e12])
    rounded = cuda(inputs, torch.bfloat16)
    truth, _ = ref.local_linear_attention(*rounded.cast(F64)[:3], lam=lam.double().cuda(), scale=inputs.scale)
    got = local_linear_attention(*rounded[:3], lam=lam.cuda(), scale=inputs.scale, **CONVERGED)
    for h in range(2):
        assert_close(f"o of head {h}", got[:, :, h], truth[:, :, h], bound("o", 1.0))


def test_views_of_a_packed_projection() -> None:
    packed = torch.randn(2, 200, 3, 3, 64, device="cuda", dtype=torch.bfloat16)
    for views in (packed.unbind(2), packed.unbind(3)):
        got = local_linear_attention(*views, lam=0.5)
        assert torch.equal(got, local_linear_attention(*(t.contiguous() for t in views), lam=0.5))
    heads_first = torch.randn(2, 3, 200, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    same = heads_first.contiguous()
    assert torch.equal(
        local_linear_attention(heads_first, heads_first, heads_first, lam=0.5),
        local_linear_attention(same, same, same, lam=0.5),
    )


def test_expanded_incoming_gradient() -> None:
    q, k, v, _ = cuda(draw(Case(m=200, n=200, d=64, dv=64)), torch.bfloat16)
    f = lambda q, k, v: local_linear_attention(q, k, v, lam=0.5)  # noqa: E731
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    f(*leaves).sum().backward()
    want = with_gradients(f, (q, k, v), torch.ones_like(v))
    for leaf, b in zip(leaves, want[1:], strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, b)


# --- packed sequences ------------------------------------------------------------------------------------

# Tiles that hold the ends of several sequences, sequences of many tiles, of one token and of none, and tokens behind
# the last.
BOUNDS = {
    "uneven": [0, 1, 1, 70, 200, 203, 383],
    "short": [*range(0, 390, 5)],
    "one": [0, 300],
    "none": [0],
}
PACKED_CASES = [
    Case(m=400, n=400, Hq=4, Hk=2, d=64, dv=64),
    Case(m=400, n=400, d=128, dv=128),
    Case(m=400, n=400, Hq=2, Hk=1, d=48, dv=40, is_causal=False),
    Case(m=400, n=400, d=64, dv=64, window=50),
    Case(m=400, n=400, d=128, dv=64, is_causal=False, window=30),
]
each_packing = pytest.mark.parametrize("packing", BOUNDS)
each_packed_case = pytest.mark.parametrize("case", PACKED_CASES, ids=str)


def bounds_of(packing: str, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(BOUNDS[packing], dtype=dtype, device="cuda")


@each_dtype
@each_packing
@each_packed_case
def test_packed_matches_definition(case: Case, packing: str, dtype: torch.dtype) -> None:
    lam = torch.full((1, case.m, case.Hq), 1.0)
    check_attention(draw(case), lam, dtype, **case.mask, cu_seqlens=bounds_of(packing))


@pytest.mark.parametrize(
    "is_causal, window",
    [(True, None), (True, 513), (False, 257), (False, 258)],  # kept weights: the middle two
)
def test_packed_sequences_of_many_tiles(is_causal: bool, window: int | None) -> None:
    case = Case(m=700, n=700, Hq=1, Hk=1, d=64, dv=64, is_causal=is_causal, window=window)
    bounds = torch.tensor([0, 37, 655, 655, 690], device="cuda")
    check_attention(draw(case), torch.full((1, 700, 1), 1.0), torch.bfloat16, **case.mask, cu_seqlens=bounds)


@each_packed_case
def test_packed_in_float32(case: Case, backend: str) -> None:
    portable_only(backend)
    lam = torch.full((1, case.m, case.Hq), 1.0)
    check_attention(draw(case), lam, torch.float32, **case.mask, cu_seqlens=bounds_of("uneven"))


@each_packed_case
def test_tokens_behind_the_last_sequence_are_not_used(case: Case) -> None:
    q, k, v, _ = cuda(draw(case), torch.bfloat16)
    x, lam = torch.randn(q.shape, device="cuda"), torch.rand(q.shape[:3], device="cuda") + 0.5
    d_o = torch.randn(*q.shape[:3], case.dv, device="cuda", dtype=torch.bfloat16)
    bounds = bounds_of("uneven", torch.int64)
    end = BOUNDS["uneven"][-1]

    def attend(q: Tensor, k: Tensor, v: Tensor, x: Tensor, lam: Tensor) -> Tensor:
        options = {**case.mask, "cu_seqlens": bounds}
        return local_linear_attention(q, k, v, lam=lam, **options) + probe_attention(q, x, k, v, **options)

    results = []
    for rubbish in (0.0, math.inf, math.nan):
        for t in (q, k, v, x, lam, d_o):
            t[:, end:] = rubbish
        results.append(with_gradients(attend, (q, k, v, x, lam), d_o))
    for got in results:
        assert all(torch.equal(a, b) for a, b in zip(got, results[0], strict=True))
        assert all((t[:, end:] == 0).all() for t in got)
        assert all(t.isfinite().all() for t in got)


@each_packed_case
def test_packed_probe_matches_definition(case: Case) -> None:
    q, k, v, scale = cuda(draw(case), torch.bfloat16)
    x = torch.randn(q.shape, device="cuda")
    d_o = torch.randn(*q.shape[:3], case.dv, device="cuda").bfloat16()
    options = {**case.mask, "scale": scale, "cu_seqlens": bounds_of("uneven")}
    truth = with_gradients(
        lambda *t: ref.probe_attention(*t, **options), tuple(t.to(F64) for t in (q, x, k, v)), d_o
    )
    got = with_gradients(lambda *t: probe_attention(*t, **options), (q, x, k, v), d_o)
    for name, g, t in zip(("o", "dq", "dx", "dk", "dv"), got, truth, strict=True):
        assert_close(name, g, t, bound(name, 1.0, torch.bfloat16))


def test_packed_statistics() -> None:
    q, k, v, _ = cuda(draw(Case(m=400, n=400, d=64, dv=64)), torch.bfloat16)
    end = BOUNDS["uneven"][-1]
    _, aux = local_linear_attention(
        q, k, v, lam=0.5, tol=1e-3, max_iters=64, cu_seqlens=bounds_of("uneven"), return_aux=True
    )
    assert (aux.ratio <= 1e-3).all()
    assert (aux.iterations[:, end:] == 0).all()
    assert (aux.ratio[:, end:] == 0).all()
    assert (aux.lse[:, end:] == -math.inf).all()
    s = torch.einsum("bihd,bjhd->bihj", q.double(), k.double()) / 8
    mask = ref.visible_keys(
        400, 400, is_causal=True, window=None, device=q.device, cu_seqlens=bounds_of("uneven")
    )
    lse = s.masked_fill(~mask[None, :, None], -math.inf).logsumexp(-1)
    torch.testing.assert_close(aux.lse[:, :end].double(), lse[:, :end], rtol=1e-4, atol=1e-4)


def test_bounds_that_are_none_stay_inside_the_tensors(backend: str) -> None:
    """Nobody reads them before the launch: the result has no meaning, but no address leaves the tensors."""
    q, k, v, _ = cuda(draw(Case(m=300, n=300, d=64, dv=64)), torch.bfloat16)
    rubbish = torch.randint(-(2**40), 2**40, (6,), device="cuda")
    for bounds in (rubbish, rubbish % 700 - 200, torch.tensor([0, 10**6], device="cuda")):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        local_linear_attention(*leaves, lam=1.0, cu_seqlens=bounds).sum().backward()
        torch.cuda.synchronize()


# --- exact rows ------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("lam", [1e-3, 1.0])
def test_single_visible_key(lam: float, dtype: torch.dtype) -> None:
    """One key leaves nothing to fit: o = v and next to no gradient but that of v, whatever the ridge."""
    q, k, v, _ = cuda(draw(Case(B=2, m=200, n=200, Hq=2, Hk=1, d=64, dv=64)), dtype)
    d_o = torch.randn(2, 200, 2, 64, device="cuda").to(dtype)
    o, dq, dk, dv = with_gradients(
        lambda q, k, v: local_linear_attention(q, k, v, lam=lam, window=1), (q, k, v), d_o
    )
    assert_close("o", o, v.double().expand_as(o), 1e-3)
    terms = float(d_o.abs().max() * v.abs().max() * q.abs().max() * k.abs().max())
    assert float(dq.abs().max()) <= 1e-3 * terms / lam * 1e-2
    assert float(dk.abs().max()) <= 1e-3 * terms / lam * 1e-2
    assert_close("dv", dv, d_o.double().sum(2, keepdim=True), 2e-3)


def test_rows_without_keys() -> None:
    q, k, v, _ = cuda(draw(Case(B=2, m=300, n=140, Hq=2, Hk=1, d=64, dv=64)), torch.bfloat16)
    leaves = [t.requires_grad_() for t in (q, k, v, torch.full((2, 300, 2), 0.5, device="cuda"))]
    o, aux = local_linear_attention(*leaves[:3], lam=leaves[3], return_aux=True)
    dq, dk, dv, dlam = torch.autograd.grad(o, leaves, torch.randn_like(o))
    blind = slice(0, 160)
    assert not o[:, blind].any()
    assert (aux.lse[:, blind] == -math.inf).all()
    for t in (aux.iterations, aux.ratio, dq, dlam):
        assert not t[:, blind].any()
    assert o[:, 160:].any(-1).all()
    for gradient in (dq, dk, dv, dlam):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("shape", [Case(B=0), Case(m=0), Case(n=0), Case(n=0, is_causal=False)], ids=str)
def test_zero_sizes(shape: Case) -> None:
    q, k, v, _ = cuda(draw(shape), torch.float16)
    leaves = [t.requires_grad_() for t in (q, k, v, torch.tensor(0.5, device="cuda"))]
    o = local_linear_attention(*leaves[:3], lam=leaves[3], is_causal=shape.is_causal)
    assert o.shape == (shape.B, shape.m, shape.Hq, shape.dv)
    assert not o.any()
    for gradient in torch.autograd.grad(o, leaves, torch.ones_like(o)):
        assert not gradient.any()


def test_nan_is_not_hidden() -> None:
    q, k, v, _ = cuda(draw(Case(n=300, m=300, d=64, dv=64)), torch.bfloat16)
    q[0, 7, 1] = math.nan
    k[0, 280, 0] = math.nan
    o, aux = local_linear_attention(q, k, v, lam=1.0, return_aux=True)
    for row in (o.isnan().all(-1)[0], aux.ratio.isnan()[0], aux.lse.isnan()[0]):
        assert row[7].tolist() == [False, True]
        assert row[280:, 0].all()
        assert not row[:256, 0].any()  # queries of blocks that do not touch the key


def test_large_ridge_is_softmax_attention() -> None:
    q, k, v, _ = cuda(draw(Case(n=500, m=500, d=64, dv=64)), torch.float16)
    wide = [t.transpose(1, 2).double() for t in (q, k, v)]
    sdpa = nn.functional.scaled_dot_product_attention(*wide, is_causal=True).transpose(1, 2)
    assert_close("o", local_linear_attention(q, k, v, lam=1e6), sdpa, 1e-3)
    assert_close("o", probe_attention(q, torch.zeros_like(q), k, v), sdpa, 1e-3)


# --- the solver's contract -------------------------------------------------------------------------------


@pytest.mark.parametrize("tol, max_iters", [(1e-2, 50), (1e-3, 16), (1e-4, 8), (1e-4, 1)])
def test_stopping_rule_is_honoured_and_reported(tol: float, max_iters: int) -> None:
    q, k, v, scale = cuda(rope(400, 64), torch.bfloat16)
    _, aux = local_linear_attention(
        q, k, v, lam=0.1, scale=scale, tol=tol, max_iters=max_iters, return_aux=True
    )
    assert (aux.iterations >= 1).all()
    assert (aux.iterations <= max_iters).all()
    assert (aux.iterations[aux.ratio > tol] == max_iters).all()
    if max_iters == 1:
        assert (aux.ratio > tol).float().mean() > 0.5, (
            "one step cannot solve these systems; ratio must say so"
        )
    if tol == 1e-2:
        assert (aux.ratio <= tol).all()


def solve_with_rounded_directions(
    inputs: Inputs, lam: float, tol: float, max_iters: int
) -> tuple[Tensor, Tensor]:
    """Iterations and last |r|^2 of each row of one causal head if the direction of a step is a vector of fp16 numbers over a power of two."""
    q, k = inputs.q[0, :, 0].double(), inputs.k[0, :, 0].double()
    p = (q @ k.mT * inputs.scale).masked_fill(~torch.ones(len(q), len(k)).tril().bool(), -math.inf).softmax(1)
    mean = p @ k
    r = q - mean
    direction, steps, acc = r.clone(), torch.zeros(len(q), dtype=torch.int), torch.zeros(len(q), dtype=F64)
    live = torch.ones(len(q), dtype=torch.bool)
    for _ in range(max_iters):
        unit = 2 ** direction.abs().amax(1, keepdim=True).clamp_min(1e-30).log2().ceil()
        direction = (direction / unit).half().double() * unit
        e = p * (direction @ k.mT - (direction * mean).sum(1, keepdim=True))
        image = e @ k - e.sum(1, keepdim=True) * mean + lam * direction
        alpha = (direction * r).sum(1) / (direction * image).sum(1)
        removed, rz = alpha * (direction * r).sum(1), r.pow(2).sum(1)
        r = r - alpha[:, None] * image
        acc += removed
        steps += live
        live = live & (removed > tol**2 * (1 + acc))
        direction = torch.where(
            live[:, None], r + (r.pow(2).sum(1) / rz)[:, None] * direction, torch.zeros(())
        )
    return steps, r.pow(2).sum(1)


def test_iterations_are_those_of_rounded_directions() -> None:
    """Which step is a row's last hangs on rounding where it has fewer keys than dimensions; the mean over rows does not.

    Against the CPU, whose directions are not rounded, this costs half a step at most (measured: 0.01 to 0.47).
    """
    for make, d in ((rope, 64), (plain, 128), (cluster, 32)):
        inputs = make(300, d).cast(torch.bfloat16)
        options = {"lam": 0.3, "scale": inputs.scale, "tol": 1e-2, "max_iters": 40, "return_aux": True}
        cpu = local_linear_attention(*(t.float() for t in inputs[:3]), **options)[1]  # type: ignore[arg-type]
        gpu = local_linear_attention(*cuda(inputs, torch.bfloat16)[:3], **options)[1]  # type: ignore[arg-type]
        steps = gpu.iterations[0, 1:, 0].cpu().double()  # the first row has one key
        want = solve_with_rounded_directions(inputs, 0.3, 1e-2, 40)[0][1:].double()
        chance = 4 * (steps - want).std() / len(steps) ** 0.5
        assert (steps - want).mean().abs() <= max(chance, 1 / len(steps))
        assert (gpu.ratio <= 1e-2).all()
        torch.testing.assert_close(gpu.lse.cpu(), cpu.lse, rtol=1e-5, atol=1e-4)


def test_zero_tolerance_is_a_fixed_count() -> None:
    """Seven steps, unless the residual vanishes in float32 first: a row that all but sees one key needs one step for 1e-3 of it."""
    inputs = rope(400, 64)
    q, k, v, scale = cuda(inputs, torch.bfloat16)
    _, aux = local_linear_attention(q, k, v, lam=0.1, scale=scale, tol=0, max_iters=7, return_aux=True)
    vanished = (aux.ratio == 0)[0, :, 0].cpu()
    assert ((aux.iterations[0, :, 0].cpu() == 7) | vanished).all()
    residual = solve_with_rounded_directions(inputs.cast(torch.bfloat16), 0.1, 0.0, 7)[1]
    assert not vanished[residual > 1e-24].any(), "far above the 1e-31 at which float32 sums of squares end"
    assert vanished[residual < 1e-44].all()
    assert 0 < vanished.sum() < 10


def test_breakdown_is_reported() -> None:
    q, k, v, _ = cuda(draw(Case(d=64, dv=64)), torch.bfloat16)
    lam = torch.ones(1, 70, 2, device="cuda")
    lam[0, 5] = -100.0
    _, aux = local_linear_attention(q, k, v, lam=lam, return_aux=True, **CONVERGED)
    assert torch.equal(aux.ratio.isinf(), lam < 0)


@pytest.mark.parametrize("steps", [1, 3])
def test_truncated_solve_has_the_implicit_gradient(steps: int) -> None:
    """The gradient of a solve that was cut short is that of the CPU: of the exact conditions, at the x and y reached."""
    inputs = rope(200, 32).cast(torch.float16)
    d_o = torch.randn(1, 200, 1, 32).half()
    f = lambda q, k, v: local_linear_attention(  # noqa: E731
        q, k, v, lam=0.1, scale=inputs.scale, tol=0, max_iters=steps
    )
    want = with_gradients(f, tuple(t.double() for t in inputs[:3]), d_o)
    got = with_gradients(f, cuda(inputs, torch.float16)[:3], d_o.cuda())
    for name, g, t in zip(NAMES, got, want, strict=False):
        assert_close(name, g.cpu(), t, bound(name, 0.1))


def test_drift_task() -> None:
    """Untrained regression under drift: 0.028 of the target's power in 16 steps; softmax has 0.15."""
    rows, total = torch.arange(256, 1024, 8), 0.0
    for seed in (4, 5, 6):
        inputs, target = drift_task(seed)
        q, k, v = cuda(inputs, torch.bfloat16)[:3]
        o = local_linear_attention(q, k, v, lam=1e-4, scale=32.0, max_iters=16)[0, :, 0].double().cpu()
        total += float((o - target)[rows].pow(2).mean() / target[rows].pow(2).mean()) / 3
    assert total <= 0.028


# --- framework contract ----------------------------------------------------------------------------------


def everything(q: Tensor, k: Tensor, v: Tensor, d_o: Tensor) -> list[Tensor]:
    lam = torch.full((q.shape[2], q.shape[3]), 0.4, device="cuda")
    solved = with_gradients(
        lambda q, k, v, lam: local_linear_attention(q, k, v, lam=lam), (q, k, v, lam), d_o
    )
    return [*solved, *with_gradients(lambda q, k, v: probe_attention(q, q.float(), k, v), (q, k, v), d_o)]


@pytest.mark.parametrize("length", [500, 700])  # kept weights, and recomputed ones
def test_bitwise_repeatable(length: int) -> None:
    """No sum depends on the order in which blocks finish, with or without deterministic mode."""
    q, k, v, _ = cuda(draw(Case(B=2, m=length, n=length, Hq=4, Hk=2, d=64, dv=64)), torch.bfloat16)
    d_o = torch.randn_like(q)
    first = everything(q, k, v, d_o)
    for _ in range(4):
        assert all(torch.equal(a, b) for a, b in zip(first, everything(q, k, v, d_o), strict=True))


@pytest.mark.parametrize("bounds", [None, [0, 100, 100, 400]], ids=["batch", "packed"])
def test_side_stream_and_graph(backend: str, bounds: list[int] | None) -> None:
    cu_seqlens = torch.tensor(bounds, device="cuda") if bounds else None
    q, k, v = (torch.randn(1, 512, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    lam = torch.full((1, 512, 4, 1), 0.5, device="cuda")
    options = (cu_seqlens, 0.125, True, None, False, 1e-3, 16, backend)
    d_o = torch.randn_like(q)

    def run() -> list[Tensor]:
        o, x, kbar, lse, *_ = ops.lla_fwd(q, k, v, lam, *options)
        return [o, *ops.lla_bwd(d_o, q, k, v, lam, x, kbar, lse, *options)]

    want = run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        got = run()
        assert not stream.query(), "the launch waited for the stream"
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        for t in captured:
            t.fill_(math.nan)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))


def test_compile_and_opcheck(backend: str) -> None:
    q, k, v, _ = cuda(draw(Case(m=200, n=260, Hq=4, Hk=2, d=64, dv=32)), torch.bfloat16)
    lam = torch.full((4,), 0.5, device="cuda")
    d_o = torch.randn(1, 200, 4, 32, device="cuda", dtype=torch.bfloat16)

    def f(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
        return local_linear_attention(q, k, v, lam=lam, window=100)

    want = with_gradients(f, (q, k, v, lam), d_o)
    got = with_gradients(torch.compile(f, fullgraph=True), (q, k, v, lam), d_o)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
    rows = torch.full((1, 200, 4, 1), 0.5, device="cuda")
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")
    leaves = [t.requires_grad_() for t in (q, k, v)]
    tolerance = {"atol": 1e-2, "rtol": 1e-2}
    torch.library.opcheck(
        ops.lla_fwd.default,
        (*leaves, rows, None, 0.125, True, None, False, 1e-3, 16, backend),
        test_utils=tests,
        **tolerance,
    )
    x = torch.randn(q.shape, device="cuda", requires_grad=True)
    torch.library.opcheck(
        ops.lla_probe_fwd.default,
        (leaves[0], x, *leaves[1:], None, 0.125, True, 50, backend),
        test_utils=tests,
        **tolerance,
    )


class Block(nn.Module):
    def __init__(self, width: int, heads: int, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend
        self.norm, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.theta = nn.Parameter(torch.zeros(heads))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = (nn.functional.rms_norm(t, t.shape[-1:]) for t in (q, k))
        o = self.attend(q, k, v, nn.functional.softplus(self.theta) + 0.05)
        x = x + self.out(o.flatten(2))
        return x + self.mlp(self.norm_mlp(x))


def training_losses(attend: Callable[..., Tensor], dtype: torch.dtype) -> list[float]:
    """Recall: after pairs (key, value) of a random dictionary, the value of a key seen before."""
    torch.manual_seed(0)
    width, vocabulary, length = 64, 32, 64
    model = nn.Sequential(
        nn.Embedding(vocabulary, width), *(Block(width, 2, attend) for _ in range(2)), nn.Linear(width, vocabulary)
    ).to("cuda", dtype)  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(200):
        table = torch.randint(16, 32, (8, 16), generator=generator)
        keys = torch.randint(0, 16, (8, length // 2), generator=generator)
        tokens = torch.stack([keys, table.gather(1, keys)], 2).flatten(1).cuda()
        loss = nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def test_training_follows_the_reference() -> None:
    """200 steps of a two-layer model: the loss is that of a float64 model with the direct solve."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
        o = local_linear_attention(*(t.bfloat16() for t in (q, k, v)), lam=lam, max_iters=32)
        return o.to(q.dtype)

    def direct(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
        return ref.local_linear_attention(q, k, v, lam=lam)[0]

    got, want = training_losses(kernel, torch.float32), training_losses(direct, F64)
    assert want[-1] < 0.9 * want[0], "the task must be learnable, or the comparison says nothing"
    mean = lambda losses: sum(losses[-20:]) / 20  # noqa: E731
    assert abs(mean(got) / mean(want) - 1) < 0.01


@pytest.mark.parametrize(
    "asked, dtype, dim, words",
    [
        ("hopper", torch.float32, 64, "float16"),
        ("hopper", torch.bfloat16, 60, "multiples of 8"),
        ("hopper", torch.bfloat16, 136, "multiples of 8"),
        ("portable", torch.float64, 64, "supported on CUDA: bfloat16, float16, float32"),
        ("portable", torch.bfloat16, 129, "up to 128"),
        ("portable", torch.float32, 129, "up to 128"),
    ],
)
def test_what_is_not_built_is_refused(
    asked: str, dtype: torch.dtype, dim: int, words: str, backend: str
) -> None:
    if asked != backend:
        pytest.skip("of the other backend")
    q = torch.randn(1, 9, 1, dim, device="cuda", dtype=dtype)
    with pytest.raises((NotImplementedError, RuntimeError), match=words):
        local_linear_attention(q, q, q, lam=1.0)
    with pytest.raises((NotImplementedError, RuntimeError), match=words):
        probe_attention(q, q, q, q)


def test_the_choice_is_explained_and_logged(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    portable_only(backend)
    lla.op._warn_once_if_slower.cache_clear()
    q = torch.randn(1, 9, 1, 24, device="cuda")
    chosen = lla.local_linear_attention(q, q, q, lam=1.0)
    lla.local_linear_attention(q, q, q, lam=1.0)
    assert torch.equal(chosen, local_linear_attention(q, q, q, lam=1.0))
    assert [r.name for r in caplog.records] == ["nearfield"]
    assert "float32" in str(explain(lla.local_linear_attention, q, q, q, lam=1.0)).lower()
    assert explain(lla.probe_attention, *(q.bfloat16(),) * 4).backend == "hopper"


def test_memory_is_linear_in_the_length() -> None:
    def peak(n: int) -> int:
        leaves = [
            torch.randn(1, n, 1, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for _ in range(3)
        ]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        local_linear_attention(*leaves, lam=1.0, max_iters=1, window=64).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    assert peak(65536) < 4.2 * peak(16384)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_readout_is_the_operator_of_parallax(dim: int, heads: tuple[int, int], window: int | None) -> None:
    """The same operator written by others, with r = -x: their definition in float32 is the truth, their kernels in bfloat16
    the yardstick."""
    parallax = pytest.importorskip("fla.ops.parallax", reason="needs flash-linear-attention")
    q, x, k, v = (
        torch.randn(2, 300, h, dim, device="cuda") for h in (heads[0], heads[0], heads[1], heads[1])
    )
    inputs = [t.bfloat16() for t in (q, 0.1 * x, k, v)]
    upstream = torch.randn_like(q).bfloat16()

    def run(function: Callable[..., Tensor], kind: torch.dtype, sign: float) -> list[Tensor]:
        leaves = [t.to(kind).requires_grad_() for t in inputs]
        out = function(leaves[0], sign * leaves[1], *leaves[2:])
        return [out, *torch.autograd.grad(out, leaves, upstream.to(out))]

    ours = run(lambda *a: probe_attention(*a, window=window), torch.bfloat16, 1.0)
    truth = run(lambda *a: parallax.naive_parallax(*a, window_size=window), torch.float32, -1.0)
    theirs = run(lambda *a: parallax.parallel_parallax(*a, window_size=window), torch.bfloat16, -1.0)
    for name, got, true, eager in zip(("o", "dq", "dx", "dk", "dv"), ours, truth, theirs, strict=True):
        assert_accurate(name, got, true, eager)
