"""Neighborhood attention and memory: strides, offsets past 32 bits, empty tensors, how much is used."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from gna_cases import Case, double_qkv
from nearfield import neighborhood_attention
from torch import Tensor


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
