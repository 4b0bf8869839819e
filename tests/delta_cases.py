"""Arguments, comparisons and hostile inputs that the tests of the delta rule share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from compare import assert_accurate
from nearfield._accuracy import DELTA_FACTOR
from nearfield.delta import (
    delta_rule,
    delta_rule_commit,
    delta_rule_reference,
    delta_rule_step,
    delta_rule_verify,
)
from torch import Tensor

GATE_KINDS = ("none", "head", "channel")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Relative L2 errors that 16-bit inputs may have against float64 on the same rounded inputs.
L2_16BIT = {
    "o": 4e-3,
    "final_state": 4e-3,
    "q": 6e-3,
    "k": 6e-3,
    "v": 6e-3,
    "initial_state": 6e-3,
    "beta": 1e-2,
}
# Float32 errors over those of the recurrence: with repeated keys the writes alternate and cancel, which magnifies
# the difference.
FLOAT32_FACTOR, FLOAT32_REPEATED_FACTOR = DELTA_FACTOR, 12.0
LEAVES = ("q", "k", "v", "beta", "g", "initial_state", "A_log", "dt_bias")


def name_of(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def make(
    B: int = 2,
    T: int = 100,
    H: int = 2,
    HV: int = 2,
    K: int = 24,
    V: int = 16,
    *,
    gate: str = "head",
    dtype: torch.dtype = torch.float64,
    strength: float = 1.0,
    beta_top: float = 1.0,
    initial: bool = True,
    sequences: int | None = None,
    state_v_first: bool = False,
) -> dict[str, Tensor]:
    """Arguments of delta_rule with unit keys; g and states in float32 for 16-bit dtypes."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = {
        "q": F.normalize(torch.randn(B, T, H, K, dtype=torch.float64), dim=-1).to(dtype),
        "k": F.normalize(torch.randn(B, T, H, K, dtype=torch.float64), dim=-1).to(dtype),
        "v": torch.randn(B, T, HV, V, dtype=torch.float64).to(dtype),
        "beta": beta_top * torch.rand(B, T, HV, dtype=wide),
    }
    if gate != "none":
        x["g"] = -strength * torch.rand(*([B, T, HV, K] if gate == "channel" else [B, T, HV]), dtype=wide)
    if initial:
        sizes = (V, K) if state_v_first else (K, V)
        x["initial_state"] = torch.randn(B if sequences is None else sequences, HV, *sizes, dtype=wide)
    return x


def run(
    function: Any, args: dict[str, Any], d_o: Tensor | None, d_state: Tensor | None, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """o, final_state and the gradient of every floating-point argument. dtype None keeps the dtypes."""
    args = dict(args)
    leaves = {}
    for name in LEAVES:
        if args.get(name) is not None:
            leaf = args[name].detach()
            leaf = leaf.clone(memory_format=torch.preserve_format) if dtype is None else leaf.to(dtype)
            args[name] = leaves[name] = leaf.requires_grad_()
    o, final_state = function(**args, output_final_state=True)
    pairs = [(o, d_o), (final_state, d_state)]
    pairs = [(y, dy.to(y.dtype)) for y, dy in pairs if dy is not None and y.requires_grad]
    grads = torch.autograd.grad(
        [y for y, _ in pairs], list(leaves.values()), [dy for _, dy in pairs], allow_unused=True
    )
    results = {"o": o.detach(), "final_state": final_state.detach()}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        results[name] = torch.zeros_like(leaf) if grad is None else grad
    return results


def check(
    args: dict[str, Any],
    *,
    only: str | None = None,
    l2_factor: float = 1.0,
    factor: float | None = None,
    scales: dict[str, float] | None = None,
) -> dict[str, Tensor]:
    """delta_rule(**args) and its gradients against float64; the yardstick is the recurrence in q's dtype."""
    dtype = args["q"].dtype
    if factor is None:
        factor = FLOAT32_FACTOR if dtype == torch.float32 else 2.0
    o, state = delta_rule(**args, output_final_state=True)
    assert state is not None
    d_o = None if only == "state" else torch.randn(o.shape, dtype=torch.float64).to(o.dtype)
    d_state = None if only == "o" else torch.randn(state.shape, dtype=torch.float64).to(state.dtype)
    got = run(delta_rule, args, d_o, d_state, None)
    truth = run(delta_rule_reference, args, d_o, d_state, torch.float64)
    eager = truth if dtype == torch.float64 else run(delta_rule_reference, args, d_o, d_state, dtype)
    assert torch.equal(got["o"], o)
    for name, value in got.items():
        expected_dtype = args[name].dtype if name in args else (o.dtype if name == "o" else state.dtype)
        assert value.dtype == expected_dtype, name
        scale = (scales or {}).get(name, 0.0)
        assert_accurate(name, value, truth[name], eager[name], factor=factor, scale=scale)
        if dtype in (torch.bfloat16, torch.float16) and value.numel():
            allowed = l2_factor * L2_16BIT.get(name, 1e-2) * max(float(truth[name].norm()), scale)
            error = float((value.double() - truth[name]).norm())
            assert error <= allowed, f"{name}: L2 error {error:.3g} > {allowed:.3g}"
    return got


SEQUENCES = {
    "empty-first": [0, 0, 30, 100],
    "empty-last": [0, 30, 100, 100],
    "empty-adjacent": [0, 64, 64, 64, 130],
    "all-short": [0, 1, 16, 33, 63, 100],
    "all-empty": [0, 0, 0],
    "none": [0],
    "long": [0, 63, 200],
}


def hostile_gates(kind: str, shape: torch.Size) -> Tensor:
    if kind == "mixed":
        return torch.where(torch.rand(shape) < 0.3, -torch.rand(shape) * 60, torch.zeros(shape))
    if kind == "rare-inf":
        return torch.where(torch.rand(shape) < 0.05, torch.full(shape, -math.inf), -0.1 * torch.rand(shape))
    if kind == "one-inf":
        g = -0.01 * torch.rand(shape)
        g[:, 33] = -math.inf
        return g
    return torch.full(shape, float(kind))


def correlated_keys(kind: str, shape: torch.Size) -> Tensor:
    base, noise = torch.randn(shape[0], 1, *shape[2:]), torch.randn(shape)
    if kind == "identical":
        k = base.expand(shape)
    elif kind == "plus-minus":
        k = base * torch.randint(0, 2, (shape[0], shape[1], shape[2], 1)).mul(2).sub(1)
    elif kind == "four-dimensional":
        k = torch.randn(*shape[:3], 4) @ torch.randn(4, shape[3])
    else:
        k = 0.9 * F.normalize(base, dim=-1) + math.sqrt(1 - 0.81) * F.normalize(noise, dim=-1)
    return F.normalize(k.double(), dim=-1)


def repeated_keys(some: slice, *, K: int = 128, **shape: Any) -> dict[str, Any]:
    """Where keys repeat and writes are strong, a walk changes to its exact form on the way."""
    args = make(K=K, strength=0.01, **shape)
    args["k"][:, some] = correlated_keys("identical", args["k"][:, some].shape).to(args["k"].dtype)
    args["beta"][:, some] = 1.9 * (0.9 + 0.1 * torch.rand(args["beta"][:, some].shape))
    return args


def kernels(run: Callable[[], Any]) -> list[Any]:
    """What the GPU does in ``run``, as the profiler's events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    return list(profiled.events())


def one_step(args: dict[str, Any], tokens: slice) -> dict[str, Any]:
    token_tensors = ("q", "k", "v", "beta", "g")
    return {n: t[:, tokens] if n in token_tensors else t for n, t in args.items() if n != "initial_state"}


def check_speculation(
    device: str, dtype: torch.dtype, pool_dtype: torch.dtype, gate: str, v_first: bool
) -> None:
    """Drafts of 1 to 8 tokens, of which any number is accepted, against the same tokens one by one: to the bit.

    Row 0 reads and writes slot 0, row 1 moves from slot to slot, row 2 is inactive at first.
    """
    kind, _, fused = gate.partition("-")
    drafts, accepted = [3, 8, 1, 5, 2], [[2, 3, 0], [8, 0, 0], [0, 1, 0], [5, 4, 3], [1, 2, 0]]
    args: dict[str, Any] = make(
        B=3, T=sum(drafts), HV=4, K=24, V=16, gate=kind, dtype=dtype, state_v_first=v_first
    )
    options: dict[str, Any] = {"use_qk_l2norm": True, "beta_activation": "sigmoid", "state_v_first": v_first}
    if fused:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        bias = torch.randn(*((4, 24) if kind == "channel" else (4,)), dtype=wide, device=device)
        options |= {"gate": fused, "A_log": torch.randn(4, dtype=wide, device=device), "dt_bias": bias}
    args = {n: t.to(device) for n, t in args.items()}
    states = torch.cat(
        [args.pop("initial_state"), torch.zeros(2, 4, *((16, 24) if v_first else (24, 16)), device=device)]
    )
    pool = states.to(pool_dtype, copy=True)
    plain = pool.to(states.dtype, copy=True)  # the states of the rows, of which row b is slot b

    def index(*slots: int) -> Tensor:
        return torch.tensor(slots, device=device)

    read = index(0, 1, -1)
    pending, kept = None, None
    start = 0
    for m, keep in zip(drafts, accepted, strict=True):
        draft = one_step(args, slice(start, start + m))
        write = index(0, 3 if int(read[1]) == 1 else 1, int(read[2]))
        o, after = delta_rule_verify(
            **draft, **options, state=pool, pending=pending, accepted=kept, read_idx=read,
            write_idx=None if pending is None else write,
        )  # fmt: skip
        if pending is not None:
            read = write
        slots = index(0, 1, 2)
        rows = plain.clone()
        want = delta_rule_step(**draft, **options, state=rows, read_idx=torch.where(read < 0, read, slots))
        assert torch.equal(o, want)
        for b, a in enumerate(keep):
            if a > 0 and read[b] >= 0:
                one = {n: t[b : b + 1, :a] for n, t in draft.items()}
                delta_rule_step(**one, **options, state=plain, read_idx=index(b))
        plain = plain.to(pool_dtype).to(plain.dtype)
        pending, kept = after, index(*keep)
        start += m
        if m == 1:  # commit, and go on without pending tokens, with row 2 from here on
            delta_rule_commit(pending, kept.int(), state=pool, read_idx=read, state_v_first=v_first)
            pending, kept = None, None
            read = index(0, int(read[1]), 2)
    delta_rule_commit(pending, kept, state=pool, read_idx=read, state_v_first=v_first)  # type: ignore[arg-type]
    for b, slot in enumerate(read.tolist()):
        assert torch.equal(pool[slot], plain[b].to(pool_dtype)), b


def operator_arguments(args: dict[str, Any], **changes: Any) -> tuple[Any, ...]:
    values = args | changes
    names = ("q", "k", "v", "beta", "g", "initial_state", "A_log", "dt_bias", "cu_seqlens")
    gate = values.get("gate", 0)
    return (*(values.get(n) for n in names), 0.5, True, 1, gate, -3.0, False)
