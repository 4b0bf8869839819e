"""Local linear attention and memory: strides and how much is used; the same bits for any number of threads."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from lla_cases import Case, draw, dtype_id, with_gradients
from nearfield.lla import local_linear_attention, local_linear_attention_step, probe_attention
from torch import Tensor


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
