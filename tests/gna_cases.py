"""Problems, inputs and comparisons that the tests of neighborhood attention share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from compare import assert_accurate
from hypothesis import strategies as st
from nearfield import neighborhood_attention
from nearfield.gna.reference import neighborhood_attention_reference
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Case:
    """One problem. The window parameters are per dimension."""

    size: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    causal: tuple[bool, ...] = ()
    batch: int = 1
    heads: int = 2
    heads_kv: int = 0
    dim: int = 8
    dim_v: int = 0
    additional: int = 0
    scale: float | None = None
    biased: bool = False
    periodic: tuple[bool, ...] = ()
    label: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        n = len(self.size)
        for name, value in (("stride", (1,) * n), ("dilation", (1,) * n)):
            object.__setattr__(self, name, getattr(self, name) or value)
        for name in ("causal", "periodic"):
            object.__setattr__(self, name, getattr(self, name) or (False,) * n)
        object.__setattr__(self, "heads_kv", self.heads_kv or self.heads)
        object.__setattr__(self, "dim_v", self.dim_v or self.dim)

    def __str__(self) -> str:
        def join(values: tuple[int, ...]) -> str:
            return "x".join(str(int(v)) for v in values)

        text = f"{self.label}-" if self.label else ""
        text += f"B{self.batch}-X{join(self.size)}-H{self.heads}:{self.heads_kv}-D{self.dim}:{self.dim_v}"
        text += f"-w{join(self.window)}-s{join(self.stride)}-d{join(self.dilation)}-c{join(self.causal)}"
        return (
            text
            + (f"-M{self.additional}" if self.additional else "")
            + "-bias" * self.biased
            + (f"-p{join(self.periodic)}" if any(self.periodic) else "")
        )

    @property
    def windows(self) -> tuple[tuple[Any, ...], ...]:
        return self.window, self.stride, self.dilation, self.causal

    @property
    def used_scale(self) -> float:
        return self.dim**-0.5 if self.scale is None else self.scale

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        shapes = [(*self.size, self.heads, self.dim), (*self.size, self.heads_kv, self.dim)]
        shapes += [(*self.size, self.heads_kv, self.dim_v)]
        if self.additional:
            shapes += [(self.additional, self.heads_kv, dim) for dim in (self.dim, self.dim_v)]
        shapes = [(self.batch, *shape) for shape in shapes]
        if self.biased:
            shapes += [(self.heads, *(2 * w - 1 for w in self.window))]
        return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]

    @property
    def optional(self) -> tuple[str, ...]:
        """The arguments behind q, k and v in ``inputs``."""
        return ("additional_keys", "additional_values") * bool(self.additional) + ("bias",) * self.biased

    def run(self, inputs: list[Tensor], backend: str | None = None) -> tuple[Tensor, Tensor]:
        q, k, v, *rest = inputs
        extra = dict(zip(self.optional, rest, strict=True))
        out = neighborhood_attention(
            q, k, v, self.window, stride=self.stride, dilation=self.dilation, is_causal=self.causal,
            scale=self.scale, return_lse=True, backend=backend, periodic=self.periodic, **extra,
        )  # fmt: skip
        assert isinstance(out, tuple)
        return out

    def reference(self, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        q, k, v, *rest = inputs
        extra = dict(zip(self.optional, rest, strict=True))
        return neighborhood_attention_reference(
            q, k, v, *self.windows, self.used_scale, periodic=self.periodic, **extra
        )


def run_with_grads(function: Any, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    outputs = function(inputs)
    grads = [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)]
    return [*outputs, *torch.autograd.grad(outputs, inputs, grads)]


def names_of(case: Case) -> list[str]:
    return ["out", "lse", "dq", "dk", "dv", *("d" + name for name in case.optional)]


def gradient_scale(
    name: str, case: Case, wide: list[Tensor], truth: Tensor, lse: Tensor, dout: Tensor
) -> float:
    """What a gradient's rounding is measured against in float32 and float64.

    dS = P (dP - delta) cancels, to zero for a single key: what counts is the size of the terms before that. P is
    recomputed from the saved lse, whose rounding is eps |lse|. In 16 bits the yardstick covers both.
    """
    if dout.dtype in (torch.float16, torch.bfloat16) or name in ("out", "lse"):
        return 0.0
    q, k, v = (float(t.detach().abs().max()) for t in wide[:3])
    terms = abs(case.used_scale) * max(q, k) * v * float(dout.double().abs().sum(-1).max())
    if name == "dbias":
        # An entry adds up dS of every query of a batch, of which each sees it with a share of P.
        terms = (
            v
            * float(dout.double().abs().sum(-1).max())
            * dout.shape[:-2].numel()
            / float(np.prod(case.window))
        )
    size = terms if name in ("dq", "dk", "dadditional_keys", "dbias") else float(truth.detach().abs().max())
    return size * max(1.0, float(lse.detach().abs().max()))


def check(case: Case, dtype: torch.dtype, inputs: list[Tensor] | None = None) -> None:
    """out, lse and every gradient of one case against the float64 reference."""
    inputs = inputs or case.inputs(dtype)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    dout = torch.randn(*inputs[0].shape[:-1], case.dim_v, dtype=torch.float64).to(dtype)
    # Rounded, so that a 16-bit yardstick sees the same gradient.
    dlse = torch.randn(inputs[0].shape[:-1], dtype=torch.float64).to(dtype)
    got = run_with_grads(case.run, inputs, [dout, dlse])
    truth = run_with_grads(case.reference, wide, [dout, dlse])
    eager = run_with_grads(case.reference, inputs, [dout, dlse])
    assert got[0].dtype == dtype
    assert got[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for name, g, t, e in zip(names_of(case), got, truth, eager, strict=True):
        scale = gradient_scale(name, case, wide, t, truth[1], dout)
        assert_accurate(f"{name} of {case} in {dtype}", g, t, e, scale=scale)


@st.composite
def problems(draw: st.DrawFn, most: int = 60) -> Case:
    rank = draw(st.integers(1, 3))
    longest = {1: most, 2: 11, 3: 6}[rank]
    size = tuple(draw(st.integers(1, longest)) for _ in range(rank))
    dilation = tuple(draw(st.integers(1, min(x, 4))) for x in size)
    window = tuple(draw(st.integers(1, x // d)) for x, d in zip(size, dilation, strict=True))
    stride = tuple(draw(st.integers(1, w)) for w in window)
    causal = tuple(draw(st.booleans()) for _ in size)
    circle = [
        not c and x % d == 0 and draw(st.booleans()) for x, d, c in zip(size, dilation, causal, strict=True)
    ]
    heads_kv = draw(st.integers(1, 2))
    return Case(
        size, window, stride, dilation, causal,
        batch=draw(st.integers(1, 2)), heads=heads_kv * draw(st.integers(1, 3)), heads_kv=heads_kv,
        dim=draw(st.integers(1, 20)), dim_v=draw(st.integers(1, 20)),
        additional=draw(st.sampled_from([0, 0, 1, 7, 270])),
        scale=draw(st.sampled_from([None, 0.0, 0.3, -1.0])),
        biased=draw(st.booleans()), periodic=tuple(circle),
    )  # fmt: skip


def double_qkv(*shape: int) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64) for _ in range(3)]


def assert_same(got: Any, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


# size, heads, heads_kv, then per head (or for all): kernel_size, stride, dilation, is_causal
PER_HEAD: list[tuple[Any, ...]] = [
    ((30,), 3, 3, ((3,), (9,), (30,)), 1, 1, False),
    ((9, 11), 4, 4, ((3, 5), (4, 4), (3, 5), (4, 4)), 1, 1, False),  # every other head alike
    ((9, 11), 5, 5, ((3, 3), (3, 3), (5, 5), (3, 3), (9, 11)), 1, 1, (True, False)),  # alike, unevenly spaced
    ((12, 13), 3, 3, (4, 3), ((1, 1), (4, 2), (2, 3)), ((1, 2), (3, 1), (2, 4)), ((False, True), (True, True), (False, False))),
    ((5, 6, 7), 6, 3, ((5, 3, 3),) * 2 + ((2, 2, 7),) * 2 + ((5, 3, 3),) * 2, 1, 1, (True, False, False)),  # shared keys
]  # fmt: skip


def per_head_inputs(problem: tuple[Any, ...], additional: int, dtype: torch.dtype, dim: int) -> list[Tensor]:
    size, heads, heads_kv, *_ = problem
    shapes = [(*size, heads, dim), (*size, heads_kv, dim), (*size, heads_kv, dim)]
    shapes += [(additional, heads_kv, dim)] * 2 if additional else []
    return [torch.randn(2, *shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def run_per_head(problem: tuple[Any, ...], inputs: list[Tensor]) -> Any:
    _, _, _, window, stride, dilation, causal = problem
    q, k, v, *extra = inputs
    named = dict(zip(("additional_keys", "additional_values"), extra, strict=False))
    return neighborhood_attention(
        q, k, v, window, stride=stride, dilation=dilation, is_causal=causal, return_lse=True, **named
    )


def run_head_by_head(problem: tuple[Any, ...], inputs: list[Tensor]) -> Any:
    """The definition, one head at a time."""
    size, heads, heads_kv, *windows = problem
    q, k, v, *extra = inputs
    parts = []
    for h in range(heads):
        rows = []
        for value in windows:
            row = value[h] if isinstance(value, tuple) and isinstance(value[0], tuple) else value
            rows.append(row if isinstance(row, tuple) else (row,) * len(size))
        kv = h * heads_kv // heads
        of_head = [q[..., h : h + 1, :], *(t[..., kv : kv + 1, :] for t in (k, v))]
        more = [t[..., kv : kv + 1, :] for t in extra]
        parts.append(neighborhood_attention_reference(*of_head, *rows, q.shape[-1] ** -0.5, *more))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, -2), torch.cat(lses, -1)


def biased_per_head(inputs: list[Tensor], attend: Any = neighborhood_attention) -> Any:
    """Heads that differ in stride, dilation and causality share the shape of their bias."""
    q, k, v, bias = inputs
    windows = ([(5, 4)] * 4, [(1, 2), (3, 1)] * 2, [(1, 1), (2, 3)] * 2, [(False, True), (False, False)] * 2)
    if attend is neighborhood_attention_reference:
        return attend(q, k, v, *windows, q.shape[-1] ** -0.5, bias=bias)
    names = dict(zip(("stride", "dilation", "is_causal"), windows[1:], strict=True))
    return attend(q, k, v, windows[0], bias=bias, return_lse=True, **names)
