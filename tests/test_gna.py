"""Neighborhood attention: windows, values, gradients, errors and the framework contract."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compare import assert_accurate
from hypothesis import given
from hypothesis import strategies as st
from nearfield import merge_attentions, neighborhood_attention
from nearfield.gna.reference import neighborhood_attention_reference, neighborhood_mask, visible_keys
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


# ---- Windows ------

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


@given(problems(most=40))
def test_windows_of_random_grids(case: Case) -> None:
    want = neighborhood_mask(case.size, *case.windows, case.periodic)
    forward, inverse = masks_of_kernel(case.size, *case.windows, case.periodic)
    assert torch.equal(forward, want)
    assert torch.equal(inverse, want.T)


# ---- Special cases that are something else by another name ------


def sdpa(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
    """Scaled dot-product attention on [B, N, H, D]."""
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), **kwargs).transpose(1, 2)


def double_qkv(*shape: int) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64) for _ in range(3)]


def assert_same(got: Any, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [(19,), (5, 7), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("window", [-1, None, "tuple"], ids=str)
def test_full_window_is_self_attention(size: tuple[int, ...], window: Any) -> None:
    q, k, v = double_qkv(2, *size, 3, 6)
    got = neighborhood_attention(q, k, v, size if window == "tuple" else window, stride=2)
    assert_same(got, sdpa(*(t.flatten(1, -3) for t in (q, k, v))).reshape(q.shape))


def test_full_causal_line_is_causal_attention() -> None:
    q, k, v = double_qkv(2, 300, 2, 6)
    assert_same(neighborhood_attention(q, k, v, 300, is_causal=True), sdpa(q, k, v, is_causal=True))


def test_frame_causal_video_is_block_causal_attention() -> None:
    q, k, v = double_qkv(1, 5, 4, 6, 2, 8)
    frame = torch.arange(5 * 4 * 6) // (4 * 6)
    want = sdpa(*(t.flatten(1, -3) for t in (q, k, v)), attn_mask=frame[:, None] >= frame).reshape(q.shape)
    assert_same(neighborhood_attention(q, k, v, -1, is_causal=(True, False, False)), want)


def test_stride_as_long_as_the_window_is_blocked_attention() -> None:
    q, k, v = double_qkv(1, 8, 12, 2, 8)

    def blocks(t: Tensor) -> Tensor:  # [B, X1, X2, H, D] -> [blocks, 4 * 3, H, D]
        return t.reshape(2, 4, 4, 3, 2, 8).permute(0, 2, 1, 3, 4, 5).reshape(8, 12, 2, 8)

    got = neighborhood_attention(q, k, v, (4, 3), stride=(4, 3))
    assert isinstance(got, Tensor)
    assert_same(blocks(got), sdpa(*(blocks(t) for t in (q, k, v))))


def test_dilation_times_window_as_long_as_the_input_is_attention_per_group() -> None:
    q, k, v = double_qkv(1, 12, 2, 8)
    got = neighborhood_attention(q, k, v, -1, dilation=3)
    for r in range(3):
        assert isinstance(got, Tensor)
        assert_same(got[:, r::3], sdpa(*(t[:, r::3] for t in (q, k, v))))


def test_a_window_of_one_returns_the_value() -> None:
    q, k, v = double_qkv(1, 3, 5, 2, 8)
    out, lse = neighborhood_attention(q, k, v, 1, return_lse=True)
    assert_same(out, v)
    assert_same(lse, (q * k).sum(-1) * 8**-0.5)


def test_rank_does_not_matter() -> None:
    q, k, v = double_qkv(2, 10, 11, 2, 8)
    want = neighborhood_attention(q, k, v, (3, 5), stride=(2, 1), dilation=(1, 2), is_causal=(True, False))
    assert isinstance(want, Tensor)
    got = neighborhood_attention(
        *(t[:, None] for t in (q, k, v)),
        (1, 3, 5),
        stride=(1, 2, 1),
        dilation=(1, 1, 2),
        is_causal=(True, True, False),
    )
    assert_same(got, want[:, None])


# ---- Values and gradients ------

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


@pytest.mark.parametrize("additional", [0, 2])
def test_gradcheck(additional: int) -> None:
    case = Case(
        (4, 5),
        (2, 3),
        (2, 1),
        (2, 1),
        (True, False),
        heads=2,
        heads_kv=1,
        dim=3,
        dim_v=2,
        additional=additional,
    )
    assert torch.autograd.gradcheck(lambda *inputs: case.run(list(inputs)), case.inputs(torch.float64))


def test_gradient_of_lse_alone() -> None:
    case = Case((6, 7), (3, 3), heads=2, dim=5)
    inputs = case.inputs(torch.float64)
    weight = torch.randn(1, 6, 7, 2, dtype=torch.float64)
    got = torch.autograd.grad((case.run(inputs)[1] * weight).sum(), inputs[:2])
    want = torch.autograd.grad((case.reference(inputs)[1] * weight).sum(), inputs[:2])
    for g, w in zip(got, want, strict=True):
        assert_same(g, w)


def test_second_derivatives_are_refused() -> None:
    case = Case((6,), (3,))
    inputs = case.inputs(torch.float64)
    (dq,) = torch.autograd.grad(case.run(inputs)[0].sum(), inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="neighborhood_attention: second derivatives"):
        torch.autograd.grad(dq.sum(), inputs[:1])


@pytest.mark.parametrize(
    "needed", range(6), ids=["q", "k", "v", "additional_keys", "additional_values", "bias"]
)
def test_only_one_input_requires_grad(needed: int) -> None:
    case = Case((6, 7), (3, 3), additional=3, biased=True)
    inputs = case.inputs(torch.float64)
    wanted = torch.autograd.grad(case.reference(inputs)[0].sum(), inputs)[needed]
    inputs = [t.detach().requires_grad_(i == needed) for i, t in enumerate(inputs)]
    (got,) = torch.autograd.grad(case.run(inputs)[0].sum(), inputs[needed])
    assert_same(got, wanted)


def test_without_grad() -> None:
    case = Case((6, 7), (3, 3))
    inputs = case.inputs(torch.float32)
    with torch.no_grad():
        out, lse = case.run(inputs)
    assert not out.requires_grad
    assert torch.equal(out, case.run([t.detach() for t in inputs])[0])
    assert torch.equal(lse, case.run(inputs)[1])


# ---- Windows per head ------

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


def biased_per_head(inputs: list[Tensor], attend: Any = neighborhood_attention) -> Any:
    """Heads that differ in stride, dilation and causality share the shape of their bias."""
    q, k, v, bias = inputs
    windows = ([(5, 4)] * 4, [(1, 2), (3, 1)] * 2, [(1, 1), (2, 3)] * 2, [(False, True), (False, False)] * 2)
    if attend is neighborhood_attention_reference:
        return attend(q, k, v, *windows, q.shape[-1] ** -0.5, bias=bias)
    names = dict(zip(("stride", "dilation", "is_causal"), windows[1:], strict=True))
    return attend(q, k, v, windows[0], bias=bias, return_lse=True, **names)


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


# ---- Memory layout ------


def test_views_of_a_packed_projection() -> None:
    packed = torch.randn(2, 9, 8, 3, 4, 16, dtype=torch.float64, requires_grad=True)
    q, k, v = packed.unbind(3)
    assert not q.is_contiguous()
    got = neighborhood_attention(q, k, v, 3)
    want = neighborhood_attention(*(t.contiguous() for t in (q, k, v)), 3)
    assert isinstance(got, Tensor)
    assert isinstance(want, Tensor)
    assert torch.equal(got, want)
    # sum() sends an expanded gradient with stride 0 in every dimension.
    (gradient,) = torch.autograd.grad(got.sum(), packed)
    (expected,) = torch.autograd.grad(want.sum(), packed)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("permutation", [(0, 3, 1, 2, 4), (0, 1, 2, 4, 3), (4, 3, 2, 1, 0)], ids=str)
def test_permuted_inputs(permutation: tuple[int, ...]) -> None:
    q, k, v = double_qkv(2, 7, 8, 3, 5)
    back = [permutation.index(i) for i in range(5)]
    strided = [t.permute(permutation).contiguous().permute(back) for t in (q, k, v)]
    got = neighborhood_attention(*strided, (3, 5), return_lse=True)
    want = neighborhood_attention(q, k, v, (3, 5), return_lse=True)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


def test_offsets_beyond_32_bits() -> None:
    """Two batch entries more than 2^31 elements apart; the untouched pages in between cost no memory."""
    stride, shape = 2**31 + 64, (1, 2, 5, 2, 8)
    memory = torch.from_numpy(np.zeros(stride + 1000, dtype=np.float16))
    far = [torch.as_strided(memory, (2, 5, 2, 8), (stride, 16, 8, 1), 200 * i) for i in range(3)]
    near = [torch.randn(shape[1:]).half() for _ in range(3)]
    for f, n in zip(far, near, strict=True):
        f.copy_(n)
    got, want = (neighborhood_attention(*t, 3) for t in (far, near))
    assert isinstance(got, Tensor)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    "case", [Case((4, 5), (3, 3), batch=0), Case((4, 5), (3, 3), batch=0, additional=2)], ids=str
)
def test_empty_batch(case: Case) -> None:
    inputs = case.inputs(torch.float32)
    out, lse = case.run(inputs)
    assert out.shape == (0, 4, 5, 2, 8)
    assert lse.shape == (0, 4, 5, 2)
    grads = torch.autograd.grad(out.sum() + lse.sum(), inputs)
    assert [g.shape for g in grads] == [t.shape for t in inputs]


def test_no_heads() -> None:
    q = torch.randn(2, 4, 5, 0, 8, requires_grad=True)
    out = neighborhood_attention(q, q, q, 3)
    assert isinstance(out, Tensor)
    assert out.shape == q.shape
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert dq.shape == q.shape


MEMORY_SCRIPT = """
import resource, torch
from nearfield import neighborhood_attention
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
q, k, v = (torch.randn(1, 20000, 1, 8, requires_grad=True) for _ in range(3))
neighborhood_attention(q[:, :50], k[:, :50], v[:, :50], 9).sum().backward()
before = peak()
neighborhood_attention(q, k, v, 20000).sum().backward()
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_is_linear_in_tokens() -> None:
    """Dense attention of 20,000 tokens, forward and backward; a matrix of scores would take 1.6 GB."""
    run = subprocess.run([sys.executable, "-c", MEMORY_SCRIPT], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 40e6


# ---- Merging ------


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_merging_is_joint_attention(parts: int) -> None:
    """Forward and backward, with the gradient of the merged lse."""
    q = torch.randn(2, 6, 3, 4, dtype=torch.float64, requires_grad=True)
    pairs = [torch.randn(2, 2, 5 + i, 3, 4, dtype=torch.float64, requires_grad=True) for i in range(parts)]

    def attend(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.einsum("bxhd,byhd->bhxy", q, k)
        return torch.einsum("bhxy,byhd->bxhd", z.softmax(-1), v), z.logsumexp(-1).transpose(1, 2)

    separate = merge_attentions(*zip(*(attend(*pair) for pair in pairs), strict=True))
    joint = attend(*torch.cat(pairs, 2))
    grads = [torch.randn_like(t) for t in joint]
    for g, w in zip(separate, joint, strict=True):
        assert_same(g, w)
    got, want = (torch.autograd.grad(t, [q, *pairs], grads) for t in (separate, joint))
    for g, w in zip(got, want, strict=True):
        assert_same(g, w)


def test_merging_neighborhood_and_additional_tokens() -> None:
    """Additional tokens in the kernel = a second attention merged afterwards."""
    case = Case((6, 7), (3, 3), dim=8, additional=4)
    inputs = case.inputs(torch.float64)
    q, k, v, add_k, add_v = inputs
    z = torch.einsum("bxyhd,bmhd->bxyhm", q, add_k) * 8**-0.5
    second = torch.einsum("bxyhm,bmhd->bxyhd", z.softmax(-1), add_v)
    first, lse = neighborhood_attention(q, k, v, 3, return_lse=True)
    merged = merge_attentions([first, second], [lse, z.logsumexp(-1)])
    joint = case.run(inputs)
    grads = [torch.randn_like(t) for t in joint]
    got, want = (torch.autograd.grad(t, inputs, grads) for t in (merged, joint))
    for g, w in zip([*merged, *got], [*joint, *want], strict=True):
        assert_same(g, w)


def test_merging_with_an_empty_set_of_keys() -> None:
    out, lse = torch.randn(1, 4, 2, 3), torch.randn(1, 4, 2)
    empty = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    for order in (1, -1):
        merged, merged_lse = merge_attentions([out, empty[0]][::order], [lse, empty[1]][::order])
        assert torch.equal(merged, out)
        assert torch.equal(merged_lse, lse)


def test_merging_computes_in_float32() -> None:
    out = [torch.randn(1, 4, 2, 3).bfloat16() for _ in range(2)]
    lse = [torch.randn(1, 4, 2) for _ in range(2)]
    merged, merged_lse = merge_attentions(out, lse)
    wide, _ = merge_attentions([t.float() for t in out], lse)
    assert merged.dtype == torch.bfloat16
    assert merged_lse.dtype == torch.float32
    assert torch.equal(merged, wide.bfloat16())


@pytest.mark.parametrize(
    "outputs,lses,words",
    [
        ([], [], ["0 outputs", "0 lses"]),
        ([(2, 3)], [], ["1 outputs", "0 lses"]),
        ([(2, 3), (2, 4)], [(2,), (2,)], ["outputs[1]", "[2, 4]", "[2, 3]"]),
        ([(2, 3)], [(2, 3)], ["lses[0]", "[2, 3]", "[2]"]),
    ],
)
def test_merging_refuses(outputs: list[Any], lses: list[Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match="merge_attentions") as error:
        merge_attentions([torch.zeros(s) for s in outputs], [torch.zeros(s) for s in lses])
    assert all(word in str(error.value) for word in words), error.value


# ---- Errors ------


def zeros(*shape: int, **kwargs: Any) -> Tensor:
    return torch.zeros(shape, **kwargs)


Q = (1, 6, 7, 4, 8)
ADD = zeros(1, 2, 4, 8)
ERRORS: list[tuple[str, type[Exception], dict[str, Any], list[str]]] = [
    ("rank", ValueError, {"q": zeros(1, 4, 8), "k": zeros(1, 4, 8), "v": zeros(1, 4, 8)}, ["q", "[1, 4, 8]"]),
    ("rank-of-k", ValueError, {"k": zeros(1, 6, 4, 8)}, ["k", "[1, 6, 4, 8]"]),
    ("batch", ValueError, {"k": zeros(2, 6, 7, 4, 8)}, ["k", "[2, 6, 7, 4, 8]"]),
    ("spatial", ValueError, {"v": zeros(1, 6, 8, 4, 8)}, ["v", "[1, 6, 8, 4, 8]"]),
    ("head-dim", ValueError, {"k": zeros(1, 6, 7, 4, 9)}, ["k", "head dim of q, 8"]),
    ("heads-of-v", ValueError, {"v": zeros(1, 6, 7, 2, 8)}, ["v", "heads as k, 4"]),
    ("gqa", ValueError, {"k": zeros(1, 6, 7, 3, 8), "v": zeros(1, 6, 7, 3, 8)}, ["4 heads", "3 heads"]),
    ("more-kv-heads", ValueError, {"k": zeros(1, 6, 7, 8, 8), "v": zeros(1, 6, 7, 8, 8)}, ["8 heads"]),
    ("no-features", ValueError, {"v": zeros(1, 6, 7, 4, 0)}, ["head dims", "0 of v"]),
    ("dtype-of-k", ValueError, {"k": zeros(*Q, dtype=torch.float64)}, ["k", "float64", "float32"]),
    ("device-of-k", ValueError, {"k": zeros(*Q, device="meta")}, ["k", "meta", "cpu"]),
    ("int-dtype", NotImplementedError, {"q": zeros(*Q, dtype=torch.int32)}, ["q", "int32", "bfloat16"]),
    ("sparse", NotImplementedError, {"q": zeros(*Q).to_sparse()}, ["q", "sparse"]),
    ("not-a-tensor", TypeError, {"v": [1.0]}, ["v", "list"]),
    ("window-length", ValueError, {"kernel_size": (3, 3, 3)}, ["kernel_size", "(3, 3, 3)", "2"]),
    ("stride-length", ValueError, {"stride": (1,)}, ["stride", "(1,)", "2"]),
    ("periodic-length", ValueError, {"periodic": (True,)}, ["periodic", "(True,)", "2"]),
    ("periodic-int", TypeError, {"periodic": (True, 1)}, ["periodic", "(True, 1)"]),
    ("periodic-causal", ValueError, {"periodic": True, "is_causal": (False, True)}, ["dimension 1", "periodic", "causal"]),
    ("periodic-dilation", ValueError, {"periodic": True, "dilation": (1, 2)}, ["size 7", "dimension 1", "dilation 2"]),
    ("periodic-per-head", ValueError,
     {"periodic": True, "kernel_size": ((3, 3), (3, 3), (3, 5), (3, 3))}, ["periodic", "kernel_size", "dimension 1"]),
    ("bias-shape", ValueError, {"bias": zeros(4, 5, 4)}, ["bias", "[4, 5, 4]", "[4, 5, 5]"]),
    ("bias-heads", ValueError, {"bias": zeros(2, 5, 5)}, ["bias", "[2, 5, 5]", "[4, 5, 5]"]),
    ("bias-dtype", ValueError, {"bias": zeros(4, 5, 5).half()}, ["bias", "float16", "float32"]),
    ("bias-per-head", ValueError, {"bias": zeros(4, 5, 5), "kernel_size": ((3, 3), (3, 3), (3, 5), (3, 3))},
     ["bias", "kernel_size", "same in all heads"]),
    ("dilation-length", ValueError, {"dilation": [1, 1, 1]}, ["dilation", "[1, 1, 1]", "2"]),
    ("causal-length", ValueError, {"is_causal": (True,)}, ["is_causal", "(True,)", "2"]),
    ("window-0", ValueError, {"kernel_size": 0}, ["kernel_size", "[0, 0]"]),
    ("window--2", ValueError, {"kernel_size": (3, -2)}, ["kernel_size", "[3, -2]"]),
    ("window-too-large", ValueError, {"kernel_size": (3, 8)}, ["kernel_size [3, 8]", "[6, 7]"]),
    ("dilated-too-large", ValueError, {"dilation": (1, 3)}, ["kernel_size [3, 3]", "[1, 3]", "[6, 7]"]),
    ("dilation-leaves-nothing", ValueError, {"kernel_size": -1, "dilation": 8}, ["kernel_size", "[8, 8]"]),
    ("stride-0", ValueError, {"stride": (1, 0)}, ["stride", "[1, 0]"]),
    ("dilation-0", ValueError, {"dilation": 0}, ["dilation", "[0, 0]"]),
    ("stride-above-window", ValueError, {"stride": (1, 4)}, ["stride", "[1, 4]", "kernel_size [3, 3]"]),
    ("window-float", TypeError, {"kernel_size": 3.0}, ["kernel_size", "3.0"]),
    ("window-bool", TypeError, {"kernel_size": True}, ["kernel_size", "True"]),
    ("stride-text", TypeError, {"stride": ("1", 1)}, ["stride", "'1'"]),
    ("causal-int", TypeError, {"is_causal": 1}, ["is_causal", "1"]),
    ("causal-ints", TypeError, {"is_causal": (True, 0)}, ["is_causal", "(True, 0)"]),
    ("scale-text", TypeError, {"scale": "1"}, ["scale", "str"]),
    ("scale-nan", ValueError, {"scale": float("nan")}, ["scale", "nan"]),
    ("keys-without-values", ValueError, {"additional_keys": ADD}, ["additional_keys", "additional_values"]),
    ("values-without-keys", ValueError, {"additional_values": ADD}, ["additional_values", "additional_keys"]),
    ("additional-heads", ValueError, {"additional_keys": zeros(1, 2, 3, 8), "additional_values": ADD},
     ["additional_keys", "[1, 2, 3, 8]", "[1, M, 4, 8]"]),
    ("additional-rank", ValueError, {"additional_keys": zeros(2, 4, 8), "additional_values": ADD},
     ["additional_keys", "[2, 4, 8]"]),
    ("additional-count", ValueError, {"additional_keys": ADD, "additional_values": zeros(1, 3, 4, 8)},
     ["additional_values", "[1, 3, 4, 8]", "2"]),
    ("additional-none", ValueError, dict.fromkeys(["additional_keys", "additional_values"], ADD[:, :0]),
     ["additional_keys", "[1, 0, 4, 8]"]),
    ("additional-dtype", ValueError,
     {"additional_keys": ADD.half(), "additional_values": ADD}, ["additional_keys", "float16"]),
]  # fmt: skip


@pytest.mark.parametrize("kind,change,words", [pytest.param(*e[1:], id=e[0]) for e in ERRORS])
def test_errors_name_the_argument(kind: type[Exception], change: dict[str, Any], words: list[str]) -> None:
    arguments: dict[str, Any] = {"q": zeros(*Q), "k": zeros(*Q), "v": zeros(*Q), "kernel_size": 3} | change
    with pytest.raises(kind, match=r"^neighborhood_attention: ") as error:
        neighborhood_attention(**arguments)
    assert all(word in str(error.value) for word in words), error.value


def test_nested_tensors_are_refused() -> None:
    ragged = torch.nested.nested_tensor([zeros(6, 4, 8), zeros(7, 4, 8)], layout=torch.jagged)
    with pytest.raises(NotImplementedError, match="neighborhood_attention: q is a sparse or nested tensor"):
        neighborhood_attention(ragged, ragged, ragged, 3)


FWD = torch.ops.nearfield.gna_fwd
BWD = torch.ops.nearfield.gna_bwd


@pytest.mark.parametrize(
    "change,words",
    [
        ({"k": zeros(1, 6, 8, 4, 8)}, ["k", "[1, 6, 8, 4, 8]"]),
        ({"v": zeros(1, 6, 7, 4, 8).half()}, ["v", "dtype"]),
        ({"kernel_size": [3, 8]}, ["kernel_size 8", "size 7"]),
        ({"kernel_size": [2**62, 3]}, ["kernel_size"]),
        ({"kernel_size": [3]}, ["kernel_size"]),
        ({"stride": [4, 1]}, ["stride 4"]),
        ({"dilation": [0, 1]}, ["dilation 0"]),
        ({"bias": zeros(4, 5, 4)}, ["bias", "[4, 5, 4]"]),
        ({"bias": zeros(4, 5, 5).double()}, ["bias", "dtype"]),
        ({"additional_k": zeros(1, 2, 4, 8)}, ["additional_k"]),
        (
            {"additional_k": zeros(1, 2, 4, 8), "additional_v": zeros(1, 3, 4, 8)},
            ["additional_v", "[1, 3, 4, 8]"],
        ),
        ({"q": zeros(1, 6, 7, 3, 8)}, ["3 query heads"]),
        ({"q": zeros(1, 6, 7, 0, 8)}, ["0 query heads"]),
        ({"out": zeros(1, 6, 7, 4, 9)}, ["out", "[1, 6, 7, 4, 9]"]),
        ({"lse": zeros(1, 6, 7, 5)}, ["lse", "[1, 6, 7, 5]"]),
        ({"lse": zeros(1, 6, 7, 4).double()}, ["lse", "dtype"]),
        ({"dlse": zeros(1, 6, 7)}, ["dlse", "[1, 6, 7]"]),
        ({"dout": zeros(1, 6, 7, 4)}, ["dout"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_direct_calls_are_checked_too(change: dict[str, Any], words: list[str]) -> None:
    windows = {"kernel_size": [3, 3], "stride": [1, 1], "dilation": [1, 1], "is_causal": [0, 0], "scale": 1.0}
    arguments: dict[str, Any] = {"q": zeros(*Q), "k": zeros(*Q), "v": zeros(*Q)}
    arguments |= {"additional_k": None, "additional_v": None} | windows
    backward = {"dout": zeros(*Q), "dlse": None, "out": zeros(*Q), "lse": zeros(*Q[:-1])}
    backward["deterministic"] = False
    op, arguments = (BWD, arguments | backward) if change.keys() & backward.keys() else (FWD, arguments)
    with pytest.raises(RuntimeError, match=r"gna_(f|b)wd: ") as error:
        op(**arguments | change)
    assert all(word in str(error.value) for word in words), error.value


# ---- The framework's contract ------


@pytest.mark.parametrize("additional", [0, 3])
def test_opcheck(additional: int) -> None:
    case = Case(
        (6, 5),
        (3, 2),
        (2, 1),
        (2, 1),
        (True, False),
        heads=4,
        heads_kv=2,
        dim=8,
        dim_v=6,
        additional=additional,
    )
    q, k, v, *extra = case.inputs(torch.float32)
    add_k, add_v = extra or (None, None)
    windows = ([3, 2], [2, 1], [2, 1], [1, 0], 0.3)
    torch.library.opcheck(FWD, (q, k, v, add_k, add_v, *windows))
    bias = torch.randn(4, 5, 3, requires_grad=True)
    torch.library.opcheck(FWD, (q, k, v, add_k, add_v, *windows, None, bias))
    tensors = [None if t is None else t.detach() for t in (q, k, v, add_k, add_v)]
    out, lse = FWD(*tensors, *windows)
    for dlse in (None, torch.randn_like(lse)):
        arguments = (torch.randn_like(out), dlse, *tensors[:3], out, lse, *tensors[3:], *windows, False)
        torch.library.opcheck(BWD, arguments)
        torch.library.opcheck(BWD, (*arguments, None, bias.detach()))


def compiled_step(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    out, lse = neighborhood_attention(
        q, k, v, (3, None), stride=(2, 1), is_causal=(True, False), return_lse=True
    )
    return merge_attentions([out * 2, out], [lse, lse + 1])


def test_compile_with_bias_and_periodic_border() -> None:
    torch._dynamo.reset()
    case = Case((6, 8), (3, 4), batch=2, biased=True, periodic=(True, False))

    def step(*inputs: Tensor) -> Tensor:
        return case.run(list(inputs))[0]

    inputs = case.inputs(torch.float32)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(*inputs).square().sum(), inputs) for f in (compiled, step))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("backend,dynamic", [("aot_eager", False), ("aot_eager", True), ("inductor", False)])
def test_compile(backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    step = torch.compile(compiled_step, fullgraph=True, backend=backend, dynamic=dynamic)
    for batch, height in ((2, 6), (3, 6), (2, 9)):
        inputs = [torch.randn(batch, height, 5, 2, 8, requires_grad=True) for _ in range(3)]
        got, want = step(*inputs), compiled_step(*inputs)
        grads = [torch.randn_like(t) for t in want]
        got, want = ([*t, *torch.autograd.grad(t, inputs, grads)] for t in (got, want))
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)
        if backend == "inductor":
            break


def test_batch_does_not_recompile() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(compiled_step, fullgraph=True, backend=counter, dynamic=True)
    for batch in (3, 7, 9):  # unlike every other size, which would be a guard
        step(*(torch.randn(batch, 6, 5, 2, 8) for _ in range(3)))
    assert counter.frame_count == 1


@pytest.mark.parametrize("additional", [0, 3])
def test_autocast(additional: int) -> None:
    case = Case((6, 7), (3, 3), additional=additional)
    inputs = case.inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = case.run(inputs)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert torch.equal(out, case.run([t.bfloat16() for t in inputs])[0])
    for grad in torch.autograd.grad(out.sum(), inputs):
        assert grad.dtype == torch.float32


def test_meta_tensors_give_shapes() -> None:
    q, k, v = (torch.empty(2, 6, 7, h, d, device="meta") for h, d in ((4, 8), (2, 8), (2, 5)))
    out, lse = neighborhood_attention(q, k, v, 3, return_lse=True)
    assert out.shape == (2, 6, 7, 4, 5)
    assert lse.shape == (2, 6, 7, 4)
    assert out.is_meta


def test_results_do_not_depend_on_threads_or_chance() -> None:
    case = Case((37, 21), (7, 5), (2, 1), (1, 2), heads=4, heads_kv=2, additional=20, batch=2, biased=True)
    inputs = case.inputs(torch.float32)
    grads = [torch.randn(2, 37, 21, 4, 8), torch.randn(2, 37, 21, 4)]
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 1, 3):
            torch.set_num_threads(count)
            runs.append(run_with_grads(case.run, inputs, grads))
    finally:
        torch.set_num_threads(threads)
    for first, other in itertools.product(runs[:1], runs[1:]):
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a, b)


def test_backend_is_for_cuda() -> None:
    q = torch.randn(1, 9, 1, 8)
    with pytest.raises(ValueError, match="backend is 'fast', expected one of"):
        neighborhood_attention(q, q, q, 3, backend="fast")
    with pytest.raises(ValueError, match="backend is 'portable', but q is on cpu"):
        neighborhood_attention(q, q, q, 3, backend="portable")
    with pytest.raises(RuntimeError, match='backend is "portable", but the CPU has one implementation'):
        torch.ops.nearfield.gna_fwd(q, q, q, None, None, [3], [1], [1], [0], 1.0, "portable")
