"""Neighborhood attention and the framework's contract: opcheck, compile, autocast, meta tensors, determinism."""

from __future__ import annotations

import itertools

import pytest
import torch
from gna_cases import Case, run_with_grads
from nearfield import merge_attentions, neighborhood_attention
from torch import Tensor

FWD = torch.ops.nearfield.gna_fwd
BWD = torch.ops.nearfield.gna_bwd


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
        torch.library.opcheck(BWD, (*arguments, None, bias.detach(), False))


def test_frozen_bias_costs_no_gradient() -> None:
    inputs = Case((9, 7), (3, 4), batch=2, biased=True).inputs(torch.float32)
    q, k, v, bias = (t.detach() for t in inputs)
    windows = ([3, 4], [1, 1], [1, 1], [0, 0], 0.3)
    out, lse = FWD(q, k, v, None, None, *windows, None, bias)
    arguments = (torch.randn_like(out), None, q, k, v, out, lse, None, None, *windows, False, None, bias)
    with_bias, without = BWD(*arguments), BWD(*arguments, False)
    assert with_bias[5].shape == bias.shape
    assert without[5].shape == (0,)
    assert all(torch.equal(a, b) for a, b in zip(with_bias[:5], without[:5], strict=True))


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
