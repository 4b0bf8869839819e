"""8-bit neighborhood attention on the CPU, its errors and the framework's contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gna_cases import Case
from gna_fp8_cases import CHECKS, FP8, check, inputs, run
from nearfield import explain, neighborhood_attention
from torch import Tensor

CASES = [
    Case((37,), (9,), (3,), (2,), (True,), heads=4, heads_kv=2, dim=16, batch=2),
    Case((9, 11), (5, 4), dim=64, heads=2),
    Case((5, 6, 7), (5, 3, 4), (1, 2, 1), causal=(True, False, False), heads=3, dim=32, dim_v=5, scale=0.3),
]


@pytest.mark.parametrize("scaled", [True, False], ids=["descaled", "plain"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case: Case, scaled: bool) -> None:
    given = inputs(case, "cpu", scaled=scaled)
    check(case, given)
    check(case, given, out_dtype=torch.float16)


def test_factors_may_be_given_one_by_one() -> None:
    case = CASES[0]
    given = inputs(case, "cpu", scaled=False)
    factor = torch.full((1, 1), 4.0).expand(2, 2)
    want = run(case, given)
    got = neighborhood_attention(
        *given.tensors,
        case.window,
        stride=case.stride,
        dilation=case.dilation,
        is_causal=case.causal,
        v_descale=factor,
    )
    assert torch.equal(got, 4 * want[0])


def small(requires_grad: bool = False) -> list[Tensor]:
    tensors = [torch.randn(2, 8, 4, 16).to(FP8), *(torch.randn(2, 8, 2, 16).to(FP8) for _ in range(2))]
    return [t.requires_grad_(requires_grad) for t in tensors]


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"bias": torch.zeros(4, 5)}, NotImplementedError, "bias is given"),
        ({"periodic": True}, NotImplementedError, "periodic is given"),
        ({"additional_keys": torch.zeros(2, 1, 2, 16).to(FP8),
          "additional_values": torch.zeros(2, 1, 2, 16).to(FP8)}, NotImplementedError, "additional_keys is given"),
        ({"backend": "hopper"}, ValueError, "backend is 'hopper'"),
        ({"scale": 0.0}, NotImplementedError, "scale is 0.0"),
        ({"out_dtype": torch.float32}, NotImplementedError, "out_dtype is torch.float32"),
        ({"k_descale": torch.ones(2, 4)}, ValueError, "k_descale has shape"),
        ({"v_descale": torch.ones(2, 2).double()}, ValueError, "v_descale has dtype"),
        ({"q_descale": torch.ones(2, 2, requires_grad=True)}, NotImplementedError, "q_descale requires a gradient"),
    ],
)  # fmt: skip
def test_refusals(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        neighborhood_attention(*small(), 3, **options)


def test_no_gradient() -> None:
    q, k, v = small(requires_grad=True)
    with pytest.raises(NotImplementedError, match="q requires a gradient"):
        neighborhood_attention(q, k, v, 3)
    with torch.no_grad():
        neighborhood_attention(q, k, v, 3)


@pytest.mark.parametrize("name", ["q_descale", "k_descale", "v_descale", "out_dtype"])
def test_arguments_of_8_bits_alone(name: str) -> None:
    q = torch.randn(2, 8, 2, 16)
    value = torch.bfloat16 if name == "out_dtype" else torch.ones(2, 2)
    with pytest.raises(ValueError, match=f"{name} is given"):
        neighborhood_attention(q, q, q, 3, **{name: value})


def test_mixed_types() -> None:
    q, k, v = small()
    with pytest.raises(ValueError, match="v has dtype"):
        neighborhood_attention(q, k, v.bfloat16(), 3)


def test_opcheck_and_meta() -> None:
    q, k, v = small()
    d = torch.rand(2, 2)
    windows = ([3], [1], [1], [1])
    torch.library.opcheck(
        torch.ops.nearfield.gna_fwd_8bit,
        (q, k, v, d, None, d, *windows, 0.25, torch.bfloat16),
        test_utils=CHECKS,
    )
    out, lse = neighborhood_attention(*(t.to("meta") for t in (q, k, v)), 3, return_lse=True)
    assert (out.shape, out.dtype) == (q.shape, torch.bfloat16)
    assert (lse.shape, lse.dtype) == (q.shape[:-1], torch.float32)


def test_compile_and_autocast() -> None:
    torch._dynamo.reset()
    q, k, v = small()
    d = torch.rand(2, 2)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return neighborhood_attention(q, k, v, 3, k_descale=d, return_lse=True)

    want = step(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


def test_no_tokens() -> None:
    q = torch.zeros(0, 8, 2, 16).to(FP8)
    assert neighborhood_attention(q, q, q, 3).shape == (0, 8, 2, 16)


def test_explain() -> None:
    q = torch.zeros(1, 512, 2, 128).to(FP8)
    told = explain(neighborhood_attention, q, q, q, 65, architecture="cpu")
    assert told.forward.refused is None
    assert "float8_e4m3fn" in str(told)
    told = explain(neighborhood_attention, q, q, q, 65, architecture="sm_90")
    assert told.forward.refused is None or "this build" in told.forward.refused
    assert "the forward alone" in str(told.backward.refused)
    refused = explain(neighborhood_attention, q, q, q, 65, architecture="sm_80").forward.refused
    assert refused is not None
    assert "Hopper's kernels" in refused or "this build" in refused
