"""Neighborhood attention that is something else by another name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gna_cases import assert_same, double_qkv
from nearfield import neighborhood_attention
from torch import Tensor


def sdpa(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
    """Scaled dot-product attention on [B, N, H, D]."""
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), **kwargs).transpose(1, 2)


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
