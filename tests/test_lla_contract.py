"""Local linear attention and the framework's contract: opcheck, compile, autocast, what requires a gradient."""

from __future__ import annotations

import math

import nearfield
import pytest
import torch
from lla_cases import F64, Case, draw, dtype_id, with_gradients
from nearfield.lla import local_linear_attention, local_linear_attention_step, probe_attention
from nearfield.lla import reference as ref
from torch import Tensor

ops = torch.ops.nearfield


def test_public_names() -> None:
    assert {"local_linear_attention", "local_linear_attention_step", "probe_attention"} <= set(
        nearfield.__all__
    )
    assert nearfield.local_linear_attention is local_linear_attention


@pytest.mark.parametrize("dtype", [F64, torch.bfloat16], ids=dtype_id)
def test_opcheck(dtype: torch.dtype) -> None:
    work = F64 if dtype == F64 else torch.float32
    inputs = draw(Case(B=2, m=10, n=20, Hq=4, Hk=2, d=8, dv=6)).cast(dtype)
    q, k, v = (t.requires_grad_() for t in inputs[:3])
    lam = torch.full((2, 10, 4, 1), 0.5, dtype=work, requires_grad=True)
    x = torch.randn(2, 10, 4, 8, dtype=work, requires_grad=True)
    mask = (None, 0.3, True, None)
    solver = (*mask, False, 1e-3, 8)
    torch.library.opcheck(ops.lla_fwd.default, (q, k, v, lam, *solver))
    torch.library.opcheck(ops.lla_probe_fwd.default, (q, x, k, v, *mask))
    narrow = x.detach().to(dtype).requires_grad_()
    torch.library.opcheck(ops.lla_probe_fwd.default, (q, narrow, k, v, *mask))
    with torch.no_grad():
        o, x, kbar, lse, _, _ = ops.lla_fwd(q, k, v, lam, *solver)
        d_o, q, k, v, lam = (torch.randn_like(o), *(t.detach() for t in (q, k, v, lam)))
        torch.library.opcheck(ops.lla_bwd.default, (d_o, q, k, v, lam, x, kbar, lse, *solver))
        torch.library.opcheck(ops.lla_probe_bwd.default, (d_o, q, x, k, v, kbar, lse, *mask))
        packed = (d_o[:1], q[:1], k[:1, :10], v[:1, :10])
        rest = (x[:1], kbar[:1], lse[:1], torch.tensor([0, 3, 8]), *solver[1:])
        torch.library.opcheck(ops.lla_bwd.default, (*packed, lam[:1], *rest))
        torch.library.opcheck(ops.lla_step.default, (q, k, v, torch.tensor([20, 5]), lam, 0.3, 7, False))


def test_second_derivatives_are_refused() -> None:
    q, k, v = (t.requires_grad_() for t in draw(Case(m=20, n=20))[:3])
    for o in (local_linear_attention(q, k, v, lam=1.0), probe_attention(q, q, k, v)):
        (dq,) = torch.autograd.grad(o.sum(), q, create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivatives"):
            torch.autograd.grad(dq.sum(), q)


def test_meta_tensors() -> None:
    q, k, v = (t.to("meta") for t in draw(Case(B=2, m=10, n=20, Hq=4, Hk=2, dv=6))[:3])
    assert local_linear_attention(q, k, v, lam=1.0).shape == (2, 10, 4, 6)
    assert probe_attention(q, q, k, v).shape == (2, 10, 4, 6)
    assert local_linear_attention_step(q, k, v, lam=1.0).shape == (2, 10, 4, 6)


def compiled_module(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    o, aux = local_linear_attention(q, k, v, lam=lam, window=9, return_aux=True)
    return probe_attention(q, o * 0.5, k, v) + local_linear_attention(q, k, v, lam=0.5), aux.iterations


@pytest.mark.parametrize("backend, dynamic", [("aot_eager", False), ("aot_eager", True), ("inductor", False)])
def test_compile(backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    f = torch.compile(compiled_module, fullgraph=True, backend=backend, dynamic=dynamic)
    for m in (12, 17) if dynamic else (12,):
        inputs = draw(Case(m=m, n=20, d=8, dv=8)).cast(torch.float32)
        leaves = (*inputs[:3], torch.rand(2, 8) + 0.3)
        d_o = torch.randn(1, m, 2, 8)
        want = with_gradients(lambda *t: compiled_module(*t)[0], leaves, d_o)
        got = with_gradients(lambda *t: f(*t)[0], leaves, d_o)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_compile_with_symbolic_options() -> None:
    """Under dynamic=True python numbers become symbols too."""
    torch._dynamo.reset()

    def f(t: Tensor, lam: float, scale: float, window: int, max_iters: int) -> Tensor:
        return local_linear_attention(t, t, t, lam=lam, scale=scale, window=window, max_iters=max_iters)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    for n, lam, scale, window, max_iters in (
        (20, 0.5, 0.3, 5, 8),
        (24, 0.7, 0.4, 7, 9),
        (30, 1.5, 1.0, 40, 3),
    ):
        t = torch.randn(1, n, 2, 8)
        assert torch.equal(compiled(t, lam, scale, window, max_iters), f(t, lam, scale, window, max_iters))


def test_compile_step() -> None:
    torch._dynamo.reset()
    step = torch.compile(local_linear_attention_step, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (20, 33):
        q, k, v, _ = draw(Case(B=2, m=1, n=n)).cast(torch.float32)
        options = {"lam": 0.5, "cache_seqlens": torch.tensor([n, 4]), "window": 8}
        assert torch.equal(step(q, k, v, **options), local_linear_attention_step(q, k, v, **options))


def test_autocast() -> None:
    inputs = draw(Case(m=20, n=20)).cast(torch.float32)
    leaves = [t.requires_grad_() for t in (*inputs[:3], torch.tensor(0.5))]
    with torch.autocast("cpu", torch.bfloat16):
        o = local_linear_attention(*leaves[:3], lam=leaves[3])
        probed = probe_attention(leaves[0], leaves[0], *leaves[1:3])
        with torch.no_grad():
            step = local_linear_attention_step(*leaves[:3], lam=leaves[3])
    assert o.dtype == probed.dtype == step.dtype == torch.bfloat16
    half = [t.detach().bfloat16() for t in leaves[:3]]
    assert torch.equal(o, local_linear_attention(*half, lam=leaves[3].detach()))
    grads = torch.autograd.grad(o, leaves, torch.ones_like(o))
    assert [g.dtype for g in grads] == [torch.float32] * 4


def test_a_slope_of_the_inputs_dtype_is_its_float() -> None:
    q, k, v, scale = draw(Case(m=20, n=20)).cast(torch.bfloat16)
    x, d_o = torch.randn_like(q), torch.randn_like(v)
    run = lambda x: with_gradients(lambda *t: probe_attention(*t, scale=scale), (q, x, k, v), d_o)  # noqa: E731
    narrow, wide = run(x), run(x.float())
    assert narrow[2].dtype == torch.bfloat16
    wide[2] = wide[2].bfloat16()
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))
    other = probe_attention(q, x.half(), k, v, scale=scale)  # neither the one nor the other: becomes float32
    assert torch.equal(other, probe_attention(q, x.half().float(), k, v, scale=scale))


def test_only_some_inputs_require_grad() -> None:
    inputs = draw(Case(m=20, n=20))
    lam = torch.tensor(0.5, dtype=F64)
    f = lambda q, k, v, lam: local_linear_attention(q, k, v, lam=lam)  # noqa: E731
    d_o = torch.randn_like(inputs.v)
    want = with_gradients(f, (*inputs[:3], lam), d_o)
    assert not f(*inputs[:3], lam).requires_grad
    for at in range(4):
        tensors = [t.clone() for t in (*inputs[:3], lam)]
        tensors[at].requires_grad_()
        assert torch.equal(torch.autograd.grad(f(*tensors), tensors[at], d_o)[0], want[at + 1])
    with torch.no_grad():
        assert torch.equal(f(*inputs[:3], lam), want[0])


def test_statistics_are_not_differentiable() -> None:
    inputs = draw(Case(m=20, n=20))
    q, k, v = (t.requires_grad_() for t in inputs[:3])
    o, aux = local_linear_attention(q, k, v, lam=0.5, return_aux=True)
    assert o.requires_grad
    assert not aux.lse.requires_grad
    assert not aux.ratio.requires_grad
    s = torch.einsum("bihd,bjhd->bihj", q, k).detach() * inputs.scale
    mask = ref.visible_keys(20, 20, is_causal=True, window=None)
    torch.testing.assert_close(aux.lse, s.masked_fill(~mask[None, :, None], -math.inf).logsumexp(-1))
