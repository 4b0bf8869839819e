"""The delta rule and memory: strides, offsets past 32 bits, how much is used."""

from __future__ import annotations

import math
import resource

import torch
from delta_cases import check, make, run
from nearfield.delta import delta_rule, delta_rule_step


def test_strides() -> None:
    """Heads-first and sliced storage, and an expanded gradient, are read in place."""
    args = make(B=2, T=70, H=2, HV=4, gate="channel")
    want = check(args)
    moved = dict(args)
    for name in ("q", "k", "v"):
        moved[name] = args[name].transpose(1, 2).contiguous().transpose(1, 2)
    moved["v"] = torch.cat([args["v"], torch.full_like(args["v"], math.nan)], -1)[..., :16]
    moved["g"] = args["g"].permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    moved["beta"] = args["beta"].transpose(1, 2).contiguous().transpose(1, 2)
    moved["initial_state"] = args["initial_state"].transpose(-1, -2).contiguous().transpose(-1, -2)
    moved["q"] = args["q"].transpose(-1, -2).contiguous().transpose(-1, -2)  # innermost stride is not 1
    o, state = delta_rule(**moved, output_final_state=True)
    assert torch.equal(o, want["o"])
    assert torch.equal(state, want["final_state"])
    ones = torch.ones((), dtype=torch.float64)
    a = run(delta_rule, moved, ones.expand(want["o"].shape), None, None)
    b = run(delta_rule, args, torch.ones_like(want["o"]), None, None)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_offsets_past_2_to_the_31() -> None:
    """A state pool and token tensors that reach past 2^31 elements; the memory between is never touched."""
    T, K, V = 3, 8, 8
    step = 2**30 + 64
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        store = torch.empty(2 * step + 4096, dtype=torch.bfloat16)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    args = make(B=1, T=T, H=1, HV=1, K=K, V=V, dtype=torch.bfloat16, initial=False)
    far = dict(args)
    for place, name in enumerate(("q", "k", "v")):
        far[name] = store[place * 64 :].as_strided((1, T, 1, K), (3 * step, step, K, 1))
        far[name].copy_(args[name])
    assert torch.equal(delta_rule(**far)[0], delta_rule(**args)[0])
    pool = store[1024:].as_strided((3, 1, K, V), (step, K * V, V, 1))
    near = torch.randn(3, 1, K, V).bfloat16()
    pool.copy_(near)
    slot = torch.tensor([2])
    assert torch.equal(
        delta_rule_step(**far, state=pool, read_idx=slot), delta_rule_step(**args, state=near, read_idx=slot)
    )
    assert torch.equal(pool, near)


def test_memory_is_linear() -> None:
    """T = 32768: a T x T buffer would take 4 GB."""
    args = make(B=1, T=32768, H=1, HV=1, K=8, V=8, dtype=torch.float32, gate="channel")
    leaves = {n: t.requires_grad_() for n, t in args.items()}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    delta_rule(**leaves)[0].sum().backward()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024
