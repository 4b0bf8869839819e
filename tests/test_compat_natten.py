"""NATTEN's signatures and results with our kernels; beside the real NATTEN where it is installed."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator
from typing import Any

import nearfield
import pytest
import torch
from compare import assert_accurate
from nearfield.compat import natten as ours
from nearfield.gna import neighborhood_attention_reference
from nearfield.nn import NeighborhoodAttention2D
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

HAS_NATTEN = importlib.util.find_spec("natten") is not None
needs_natten = pytest.mark.skipif(not HAS_NATTEN, reason="NATTEN is not installed")

FUNCTIONS = {1: ours.na1d, 2: ours.na2d, 3: ours.na3d}
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "1d": ((17,), {"kernel_size": 5}),
    "1d-causal-strided": ((17,), {"kernel_size": 6, "stride": 3, "is_causal": True}),
    "1d-whole": ((9,), {"kernel_size": 9, "is_causal": True}),
    "2d-dilated": ((9, 11), {"kernel_size": (3, 4), "dilation": (2, 1), "scale": 0.3}),
    "2d-mixed": ((8, 7), {"kernel_size": (4, 5), "stride": (2, 1), "is_causal": (False, True)}),
    "2d-whole": ((4, 5), {"kernel_size": (4, 5)}),
    "3d": ((4, 6, 5), {"kernel_size": (2, 3, 3), "stride": (1, 2, 1), "is_causal": (True, False, False)}),
}


def inputs(size: tuple[int, ...], tokens: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q with 4 heads, k and v with 2, and additional keys and values if there are tokens."""
    heads = (4, 2, 2)
    tensors = [torch.randn(2, *size, h, 8, dtype=dtype) for h in heads]
    return tensors + [torch.randn(2, tokens, 2, 8, dtype=dtype) for _ in range(2) if tokens]


def per_dimension(value: Any, n: int) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,) * n


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("name", [*CASES])
def test_na_is_the_reference(name: str, tokens: int) -> None:
    size, options = CASES[name]
    q, k, v, *extra = inputs(size, tokens)
    n = len(size)
    named = dict(zip(("additional_keys", "additional_values"), extra, strict=False))
    out, lse = FUNCTIONS[n](q, k, v, **options, **named, return_lse=True)
    parameters = [per_dimension(options.get(p, d), n) for p, d in
                  (("kernel_size", 0), ("stride", 1), ("dilation", 1), ("is_causal", False))]  # fmt: skip
    truth, truth_lse = neighborhood_attention_reference(
        q, k, v, *parameters, options.get("scale", 8**-0.5), *extra
    )
    torch.testing.assert_close(out, truth, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, truth_lse, rtol=0, atol=1e-12)
    assert isinstance(FUNCTIONS[n](q, k, v, **options), Tensor)


def test_none_and_zero_mean_the_default() -> None:
    q, k, v = inputs((9, 7))
    plain = ours.na2d(q, k, v, 3)
    assert torch.equal(ours.na2d(q, k, v, 3, stride=None, dilation=None, is_causal=None, scale=0), plain)
    assert torch.equal(ours.na2d(query=q, key=k, value=v, kernel_size=3, attention_kwargs={}), plain)


@pytest.mark.parametrize("m,n", [(7, 7), (5, 12), (12, 5), (10, 5), (1, 6), (6, 1)])
def test_attention_is_dense(m: int, n: int) -> None:
    q, k, v = torch.randn(2, m, 4, 8), torch.randn(2, n, 2, 8), torch.randn(2, n, 2, 6)
    q, k, v = (t.double().requires_grad_() for t in (q, k, v))
    causal = m == n
    out, lse = ours.attention(q, k, v, is_causal=causal, scale=0.2, return_lse=True)
    kk, vv = (t.repeat_interleave(2, 2) for t in (k, v))
    scores = 0.2 * torch.einsum("bmhd,bnhd->bhmn", q, kk)
    if causal:
        scores = scores.masked_fill(~torch.ones(m, n, dtype=torch.bool).tril(), -torch.inf)
    truth = torch.einsum("bhmn,bnhd->bmhd", scores.softmax(-1), vv)
    truth_lse = scores.logsumexp(-1).transpose(1, 2)
    torch.testing.assert_close(out, truth, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, truth_lse, rtol=0, atol=1e-12)
    weights, lse_weights = torch.randn_like(out), torch.randn_like(lse)
    got = torch.autograd.grad((out * weights).sum() + (lse * lse_weights).sum(), (q, k, v))
    expected = torch.autograd.grad((truth * weights).sum() + (truth_lse * lse_weights).sum(), (q, k, v))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("lengths_kv", [[3, 1, 8, 4], [5, 9, 1, 1]])
def test_attention_of_packed_sequences(lengths_kv: list[int]) -> None:
    lengths = [3, 1, 8, 4]
    q = torch.randn(1, sum(lengths), 4, 8).double()
    k, v = torch.randn(2, 1, sum(lengths_kv), 2, 8).double()
    causal = lengths == lengths_kv
    alone = [
        ours.attention(a, b, c, is_causal=causal, return_lse=True)
        for a, b, c in zip(q.split(lengths, 1), k.split(lengths_kv, 1), v.split(lengths_kv, 1), strict=True)
    ]
    starts = [torch.tensor([0, *l]).cumsum(0).int() for l in (lengths, lengths_kv)]
    packed = (
        ours.attention(
            q, k, v, is_causal=causal, seqlens_Q=torch.tensor(lengths), seqlens_KV=torch.tensor(lengths_kv),
            return_lse=True,
        ),
        ours.attention(
            q, k, v, is_causal=causal, cumulative_seqlen_Q=starts[0], cumulative_seqlen_KV=starts[1],
            max_seqlen_Q=8, max_seqlen_KV=9, return_lse=True,
        ),
    )  # fmt: skip
    for result in packed:
        for part, got in enumerate(result):
            torch.testing.assert_close(got, torch.cat([a[part] for a in alone], 1), rtol=0, atol=0)


def test_a_sequence_without_keys_gives_zeros() -> None:
    q, k, v = torch.randn(1, 5, 2, 8), *torch.randn(2, 1, 4, 2, 8)
    out, lse = ours.attention(
        q, k, v, seqlens_Q=torch.tensor([2, 3]), seqlens_KV=torch.tensor([0, 4]), return_lse=True
    )
    assert (out[:, :2] == 0).all()
    assert (lse[:, :2] == -torch.inf).all()
    torch.testing.assert_close(out[:, 2:], ours.attention(q[:, 2:], k, v))


def test_merged_halves_are_the_whole() -> None:
    q, k, v = (t.requires_grad_() for t in inputs((10,)))
    whole, whole_lse = ours.attention(q, k, v, return_lse=True)
    parts = [
        ours.attention(q, k[:, s], v[:, s], return_lse=True) for s in (slice(0, 3), slice(3, 4), slice(4, 10))
    ]
    merged, merged_lse = ours.merge_attentions(
        [p[0] for p in parts], [p[1] for p in parts], torch_compile=False
    )
    torch.testing.assert_close(merged, whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(merged_lse, whole_lse, rtol=0, atol=1e-12)
    weights = torch.randn_like(whole)
    got, expected = (torch.autograd.grad(t, (q, k, v), weights) for t in (merged, whole))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


def test_layers_of_both_share_parameters() -> None:
    layer = NeighborhoodAttention2D(24, 3, 3)
    assert [(n, tuple(p.shape)) for n, p in layer.named_parameters()] == [
        ("qkv.weight", (72, 24)), ("qkv.bias", (72,)), ("proj.weight", (24, 24)), ("proj.bias", (24,))
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ bad input

X = torch.randn(1, 6, 7, 2, 8)
S = torch.randn(1, 6, 2, 8)


@pytest.mark.parametrize(
    "argument",
    [
        {"backend": "hopper-fna"},
        {"q_tile_shape": (8, 8)},
        {"kv_tile_shape": (8, 8)},
        {"backward_q_tile_shape": (8, 8)},
        {"backward_kv_tile_shape": (8, 8)},
        {"backward_kv_splits": (1, 1)},
        {"backward_use_pt_reduction": True},
        {"run_persistent_kernel": False},
        {"kernel_schedule": "coop"},
        {"torch_compile": True},
        {"attention_kwargs": {"backend": "cutlass-fmha"}},
    ],
    ids=lambda a: next(iter(a)),
)
def test_choices_among_kernels_are_refused(argument: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match=next(iter(argument))):
        ours.na2d(X, X, X, 3, **argument)
    if "shape" not in next(iter(argument)) and "kwargs" not in next(iter(argument)):
        with pytest.raises(NotImplementedError, match=next(iter(argument))):
            ours.attention(S, S, S, **argument)


@pytest.mark.parametrize(
    "text,call",
    [
        ("na1d: query has shape", lambda: ours.na1d(X, X, X, 3)),
        ("na3d: query has shape", lambda: ours.na3d(query=X, key=X, value=X, kernel_size=3)),
        ("attention: key has shape", lambda: ours.attention(S, X, X)),
        ("expected \\[B, m, H, D\\]", lambda: ours.attention(S, S[:, :4], S)),
        ("given together", lambda: ours.attention(S, S, S, seqlens_Q=torch.tensor([6]))),
        ("cumulative_seqlen_Q is missing", lambda: ours.attention(S, S, S, max_seqlen_Q=6)),
        (
            "not both",
            lambda: ours.attention(S, S, S, seqlens_Q=torch.tensor([6]), cumulative_seqlen_Q=torch.tensor([0, 6])),
        ),
        (
            "rise from 0 to 6",
            lambda: ours.attention(S, S, S, seqlens_Q=torch.tensor([5]), seqlens_KV=torch.tensor([6])),
        ),
        (
            "max_seqlen_Q is 3",
            lambda: ours.attention(
                S, S, S, cumulative_seqlen_Q=torch.tensor([0, 6]), cumulative_seqlen_KV=torch.tensor([0, 6]),
                max_seqlen_Q=3,
            ),
        ),
        ("at least two", lambda: ours.merge_attentions([S], [S[..., 0]])),
    ],
)  # fmt: skip
def test_bad_input_is_named(text: str, call: Any) -> None:
    with pytest.raises(ValueError, match=text):
        call()


def test_causal_needs_as_many_keys_as_queries() -> None:
    with pytest.raises(NotImplementedError, match="6 queries and 4 keys"):
        ours.attention(S, S[:, :4], S[:, :4], is_causal=True)


@pytest.mark.skipif(HAS_NATTEN, reason="NATTEN is installed")
def test_patch_without_natten_says_so() -> None:
    with pytest.raises(ImportError, match="NATTEN cannot be imported"):
        ours.patch()


# ------------------------------------------------------------------------------------- beside the real NATTEN


@pytest.fixture
def natten() -> Iterator[Any]:
    import natten

    yield natten
    ours.unpatch()


@needs_natten
@pytest.mark.parametrize("name", ["na1d", "na2d", "na3d", "attention", "merge_attentions"])
def test_signatures_are_the_same(natten: Any, name: str) -> None:
    def shape(function: Any) -> list[tuple[str, Any]]:
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    assert shape(getattr(ours, name)) == shape(getattr(natten, name))


@needs_natten
@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("name", [*CASES])
def test_results_are_those_of_natten(natten: Any, name: str, tokens: int) -> None:
    """Forward only: on a CPU NATTEN has no gradients."""
    if name == "1d-whole" and not tokens:
        pytest.skip("NATTEN has no dense causal attention on a CPU")
    size, options = CASES[name]
    tensors = inputs(size, tokens, torch.float32)

    def run(library: Any, tensors: list[Tensor]) -> Any:
        named = dict(zip(("additional_keys", "additional_values"), tensors[3:], strict=False))
        return getattr(library, f"na{len(size)}d")(*tensors[:3], **options, **named, return_lse=True)

    truth = run(ours, [t.double() for t in tensors])
    for what, got, true, eager in zip(
        ("out", "lse"), run(ours, tensors), truth, run(natten, tensors), strict=True
    ):
        assert_accurate(what, got, true, eager)


@needs_natten
def test_patch_swaps_natten_and_its_modules_and_back(natten: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = [natten.na2d]  # in a list, where patch does not look
    calls = []
    real = nearfield.gna.neighborhood_attention

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[0].shape)
        return real(*args, **kwargs)

    monkeypatch.setattr(nearfield.gna, "neighborhood_attention", counted)
    module = natten.NeighborhoodAttention2D(24, 3, 3)
    layer = NeighborhoodAttention2D(24, 3, 3)
    layer.load_state_dict(module.state_dict())
    x = torch.randn(1, 5, 6, 24)
    with torch.no_grad():
        before = module(x)
    assert not calls
    ours.patch()
    ours.patch()
    assert natten.na2d is natten.functional.na2d is not theirs[0]
    assert natten.functional.merge_attentions is natten.attn_merge.merge_attentions
    after = module(x)
    assert len(calls) == 1
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(layer(x), before)
    with ours.patched():
        assert natten.na2d is not theirs[0]
    assert natten.na2d is not theirs[0], "the inner block must not undo the outer patch"
    ours.unpatch()
    assert natten.na2d is natten.functional.na2d is theirs[0]
    with ours.patched():
        assert natten.na2d is not theirs[0]
    assert natten.na2d is theirs[0]
    ours.unpatch()
    assert ours.na2d is not theirs[0]


@needs_natten
def test_dense_attention_is_that_of_natten(natten: Any) -> None:
    q, k, v = torch.randn(2, 6, 4, 32), *torch.randn(2, 2, 9, 2, 32)
    out, lse = ours.attention(q, k, v, return_lse=True)
    theirs, theirs_lse = natten.attention(q, k, v, return_lse=True)
    torch.testing.assert_close(out, theirs)
    torch.testing.assert_close(lse, theirs_lse)
    dense = scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), enable_gqa=True)
    torch.testing.assert_close(out, dense.transpose(1, 2))
