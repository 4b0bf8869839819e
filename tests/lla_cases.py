"""Problems, inputs and comparisons that the tests of local linear attention share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from compare import assert_accurate
from nearfield.lla import local_linear_attention
from nearfield.lla import reference as ref
from torch import Tensor

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
