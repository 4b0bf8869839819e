"""The delta rule and the framework's contract: opcheck, compile, autocast, meta tensors, determinism."""

from __future__ import annotations

from typing import Any

import nearfield
import pytest
import torch
from delta_cases import GATE_KINDS, make, one_step, operator_arguments, run
from nearfield.delta import delta_rule, delta_rule_step
from torch import Tensor


def contract_cases() -> dict[str, dict[str, Any]]:
    torch.manual_seed(0)
    gated = make(T=20, gate="channel", dtype=torch.float32)
    packed = make(B=1, T=20, sequences=2, dtype=torch.bfloat16)
    return {
        "plain": make(T=20, gate="none", initial=False),
        "gated": gated | {"A_log": torch.randn(2), "dt_bias": torch.randn(48), "gate": 1},
        "packed": packed | {"cu_seqlens": torch.tensor([0, 7, 18])},
    }


@pytest.mark.parametrize("name", ["plain", "gated", "packed"])
def test_opcheck(name: str) -> None:
    args = contract_cases()[name]
    tensors = {
        n: t.requires_grad_() for n, t in args.items() if isinstance(t, Tensor) and t.is_floating_point()
    }
    arguments = operator_arguments(args | tensors)
    ops = torch.ops.nearfield
    torch.library.opcheck(ops.delta_fwd.default, (*arguments, True))
    torch.library.opcheck(ops.delta_fwd.default, (*arguments, False))
    torch.library.opcheck(ops.delta_fwd_kept.default, (*arguments, True))
    torch.library.opcheck(
        ops.delta_fwd_states.default,
        (*(a.detach() if isinstance(a, Tensor) else a for a in arguments), True, 1),
    )
    with torch.no_grad():
        o, state = ops.delta_fwd(*arguments, True)
    detached = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
    torch.library.opcheck(ops.delta_bwd.default, (o, state, *detached))
    torch.library.opcheck(ops.delta_bwd.default, (None, state, *detached))
    o, state, kept = ops.delta_fwd_kept(*detached, True)
    assert kept.shape == (0,)
    torch.library.opcheck(ops.delta_bwd.default, (o, state, *detached, None, kept))


def test_opcheck_step() -> None:
    args = make(T=2, dtype=torch.float32)
    pool = args.pop("initial_state")
    tensors = (
        args["q"],
        args["k"],
        args["v"],
        args["beta"],
        args["g"],
        pool,
        torch.tensor([1, -1]),
        None,
        None,
        None,
    )
    torch.library.opcheck(torch.ops.nearfield.delta_step.default, (*tensors, 0.5, True, 1, 0, -5.0, False))


def compiled_results(function: Any, args: dict[str, Any]) -> list[Tensor]:
    leaves = {n: t.clone().requires_grad_() for n, t in args.items() if t.is_floating_point()}
    o, state = function(**args | leaves)
    return [o, state, *torch.autograd.grad(o.square().sum() + state.square().sum(), list(leaves.values()))]


@pytest.mark.parametrize("backend, dynamic", [("aot_eager", False), ("aot_eager", True), ("inductor", False)])
def test_compile(backend: str, dynamic: bool) -> None:
    def function(**kw: Any) -> Any:
        return delta_rule(**kw, use_qk_l2norm=True, beta_activation="sigmoid", output_final_state=True)

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)
    for T in (40, 70) if dynamic else (40,):
        packed: dict[str, Any] = make(B=1, T=T, HV=4, gate="channel", sequences=2, dtype=torch.float32)
        packed["cu_seqlens"] = torch.tensor([0, 7, T - 3])
        got, want = compiled_results(compiled, packed), compiled_results(function, packed)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_compile_step() -> None:
    torch._dynamo.reset()
    args = make(T=3, dtype=torch.float32)
    pool, start = args.pop("initial_state"), torch.tensor([1, 0])
    want_pool = pool.clone()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(pool: Tensor, **kw: Tensor) -> Tensor:
        return delta_rule_step(**kw, state=pool, read_idx=start) + pool.sum()

    got = step(pool, **args)
    want = delta_rule_step(**args, state=want_pool, read_idx=start) + want_pool.sum()
    torch.testing.assert_close(got, want)
    assert torch.equal(pool, want_pool)


def test_autocast() -> None:
    """q, k and v are cast, as for attention; gates, write strengths and states keep their precision."""
    args = make(gate="channel", dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, state = delta_rule(**args, output_final_state=True)
        pool = args["initial_state"].clone()
        stepped = delta_rule_step(**one_step(args, slice(0, 4)), state=pool)
    assert o.dtype == stepped.dtype == torch.bfloat16
    assert state is not None
    assert state.dtype == torch.float32
    cast = args | {n: args[n].bfloat16() for n in ("q", "k", "v")}
    want, want_state = delta_rule(**cast, output_final_state=True)
    assert torch.equal(o, want)
    assert torch.equal(state, want_state)
    leaves = {n: t.clone().requires_grad_() for n, t in args.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = delta_rule(**leaves)[0].float().sum()
    loss.backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in leaves.values())


def test_meta_tensors() -> None:
    args = {n: t.to("meta") for n, t in make(dtype=torch.bfloat16, HV=4).items()}
    o, state = delta_rule(**args, output_final_state=True)
    assert (o.shape, o.dtype) == ((2, 100, 4, 16), torch.bfloat16)
    assert state is not None
    assert (state.shape, state.dtype) == ((2, 4, 24, 16), torch.float32)


@pytest.mark.parametrize("gate", GATE_KINDS)
def test_deterministic(gate: str) -> None:
    """Bitwise, for repeated runs and for one or two threads; V = 144 is also split over the threads."""
    args: dict[str, Any] = make(B=1, T=150, H=1, HV=1, V=144, gate=gate, dtype=torch.float32)
    if gate != "none":
        args |= {"gate": "softplus", "A_log": torch.randn(1)}
    d_o, d_state = torch.randn(1, 150, 1, 144), torch.randn(1, 1, 24, 144)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 1, 2, 2):
            torch.set_num_threads(threads)
            runs.append(run(delta_rule, args, d_o, d_state, None))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(other[name], value) for name, value in runs[0].items())


def test_exported() -> None:
    assert {"delta_rule", "delta_rule_step"} <= set(nearfield.__all__)
    assert nearfield.delta_rule is delta_rule
