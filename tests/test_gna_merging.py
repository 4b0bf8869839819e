"""Merging attentions over parts of the keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gna_cases import Case, assert_same
from nearfield import merge_attentions, neighborhood_attention
from torch import Tensor


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
