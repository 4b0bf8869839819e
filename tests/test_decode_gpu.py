"""Decoding on CUDA: every layout, type and option against the float64 definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from compare import assert_accurate
from delta_cases import GATE_KINDS, check_speculation, make, name_of, one_step
from lla_cases import HOSTILE, LAMS, Case, draw
from nearfield.delta import delta_rule_reference, delta_rule_step, delta_rule_verify
from nearfield.lla import local_linear_attention_step
from nearfield.lla import reference as lla
from torch import Tensor

pytestmark = pytest.mark.gpu

INF, NAN = math.inf, math.nan


# ----------------------------------------------------------------------------------------------- delta rule


def on_gpu(args: dict[str, Any]) -> dict[str, Any]:
    return {n: t.cuda() if isinstance(t, Tensor) else t for n, t in args.items()}


def step_by_step(args: dict[str, Any], options: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The recurrence in ``dtype``: outputs, and the state after every token [T, B, HV, ..]."""
    args = {n: t.cuda().to(dtype) for n, t in args.items()}
    state, outputs, states = args.pop("initial_state"), [], []
    for t in range(args["q"].shape[1]):
        o, state = delta_rule_reference(
            **one_step(args, slice(t, t + 1)), **options, initial_state=state, output_final_state=True
        )
        outputs.append(o)
        states.append(state)
    return torch.cat(outputs, 1), torch.stack(states)


def assert_step(what: str, got: Tensor, truth: Tensor, eager: Tensor, states: Tensor) -> None:
    """``eager`` is the float32 recurrence, but its sums over the keys round in another order: with at most 8 tokens,
    each may differ by one rounding of the largest entry of ``states``, from which they started."""
    scale = 8 * float(states.abs().max()) if got.dtype == torch.float32 else 0.0
    assert_accurate(what, got, truth, eager.to(got.dtype), factor=3, scale=scale)


def check_step(args: dict[str, Any], pool_dtype: torch.dtype, **options: Any) -> None:
    """One call against float64; the yardstick is the recurrence in float32, rounded once."""
    args = args | {"initial_state": args["initial_state"].to(pool_dtype)}
    truth, states = step_by_step(args, options, torch.float64)
    eager, eager_states = step_by_step(args, options, torch.float32)
    pool = args["initial_state"].cuda()
    o = delta_rule_step(**on_gpu(one_step(args, slice(None))), **options, state=pool)
    assert o.dtype == args["q"].dtype
    assert_step("o", o, truth, eager, args["initial_state"])
    assert_step("state", pool, states[-1], eager_states[-1], args["initial_state"])


POOLS = pytest.mark.parametrize("pool_dtype", [torch.float32, torch.bfloat16], ids=name_of)
LAYOUTS = pytest.mark.parametrize("v_first", [False, True], ids=["KV", "VK"])
SHAPES = [
    {"B": 1, "T": 1, "H": 1, "HV": 1, "K": 4, "V": 4},
    {"B": 3, "T": 1, "H": 2, "HV": 4, "K": 128, "V": 128},
    {"B": 2, "T": 8, "H": 1, "HV": 3, "K": 64, "V": 64},
    {"B": 2, "T": 3, "H": 2, "HV": 2, "K": 100, "V": 60},
    {"B": 5, "T": 2, "H": 1, "HV": 8, "K": 256, "V": 128},
    {"B": 1, "T": 5, "H": 2, "HV": 2, "K": 128, "V": 256},
    {"B": 2, "T": 8, "H": 1, "HV": 1, "K": 256, "V": 256},
    {"B": 2, "T": 4, "H": 1, "HV": 2, "K": 20, "V": 516},
]


@LAYOUTS
@POOLS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(f"{n}{x}" for n, x in s.items()))
@pytest.mark.parametrize("gate", ["none", "head", "channel"])
def test_step(
    gate: str, shape: dict[str, int], dtype: torch.dtype, pool_dtype: torch.dtype, v_first: bool
) -> None:
    check_step(
        make(**shape, gate=gate, dtype=dtype, state_v_first=v_first), pool_dtype, state_v_first=v_first
    )


@LAYOUTS
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("activation", ["none", "sigmoid", "sigmoid2"])
@pytest.mark.parametrize("gate", ["head-softplus", "head-bounded", "channel-softplus", "channel-bounded"])
@pytest.mark.parametrize("small_dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_step_fused_preprocessing(
    small_dtype: torch.dtype, gate: str, activation: str, biased: bool, v_first: bool
) -> None:
    kind, _, name = gate.partition("-")
    args: dict[str, Any] = make(T=4, HV=4, K=96, V=80, gate=kind, dtype=torch.bfloat16, state_v_first=v_first)
    for tensor in ("g",) if activation == "none" else ("beta", "g"):
        args[tensor] = (3 * torch.randn(args[tensor].shape)).to(small_dtype)
    if name == "softplus" or biased:
        args["A_log"] = torch.randn(4).to(small_dtype)
    if biased:
        args["dt_bias"] = torch.randn(*((4, 96) if kind == "channel" else (4,))).to(small_dtype)
    args["q"] *= 3
    args["k"] *= 0.2
    check_step(
        args,
        torch.float32,
        use_qk_l2norm=True,
        beta_activation=activation,
        gate=name,
        gate_bound=-4.0,
        state_v_first=v_first,
    )


@LAYOUTS
@pytest.mark.parametrize("gate", ["head", "channel"])
@pytest.mark.parametrize(
    "name", ["strong", "forget", "mixed", "zero-beta", "beta-2", "zero-rows", "repeated", "opposite", "large"]
)
def test_step_hostile(name: str, gate: str, v_first: bool) -> None:
    args = make(T=8, HV=4, K=128, V=64, gate=gate, state_v_first=v_first)
    q, k, g, beta = args["q"], args["k"], args["g"], args["beta"]
    if name == "strong":
        g.fill_(-1e4)
    elif name == "forget":
        g[:, ::2] = -INF
    elif name == "mixed":
        g[:, ::2], g[:, 1::4] = 0, -50
    elif name == "zero-beta":
        beta.zero_()
    elif name == "beta-2":
        beta.fill_(1.99)
    elif name == "zero-rows":
        q[:, ::2], k[:, 1::2] = 0, 0
    elif name in ("repeated", "opposite"):
        k[:] = k[:, :1]
        beta.fill_(1.0)
        g.zero_()
        if name == "opposite":
            k[:, ::2] *= -1
    else:
        args["initial_state"] *= 1e2
    for tensor in args:
        args[tensor] = args[tensor].float()
    check_step(args, torch.float32, use_qk_l2norm=name == "zero-rows", state_v_first=v_first)


@LAYOUTS
@pytest.mark.parametrize("m", [1, 3, 8])
def test_decode_equals_prefill(m: int, v_first: bool) -> None:
    """Calls of m tokens chained over the pool are one run of the recurrence."""
    args = make(T=24, HV=4, K=64, V=64, gate="channel", dtype=torch.float32, state_v_first=v_first)
    truth, states = step_by_step(args, {"state_v_first": v_first}, torch.float64)
    eager, eager_states = step_by_step(args, {"state_v_first": v_first}, torch.float32)
    pool = args["initial_state"].cuda()
    outputs = [
        delta_rule_step(**on_gpu(one_step(args, slice(t, t + m))), state=pool, state_v_first=v_first)
        for t in range(0, 24, m)
    ]
    assert_step("o", torch.cat(outputs, 1), truth, eager, args["initial_state"])
    assert_step("state", pool, states[-1], eager_states[-1], args["initial_state"])


def padded_pool(states: Tensor, padding: int, fill: float) -> Tensor:
    """The same states with ``padding`` elements behind every slot."""
    size = states[0].numel()
    storage = torch.full((states.shape[0] * (size + padding),), fill, dtype=states.dtype, device="cuda")
    pool = storage.as_strided(states.shape, (size + padding, *states.stride()[1:]))
    return pool.copy_(states)


@LAYOUTS
@POOLS
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=name_of)
def test_step_slots(index_dtype: torch.dtype, pool_dtype: torch.dtype, v_first: bool) -> None:
    """Rows read and write the slots they name; nothing else changes, NaN in other slots does not leak."""
    args = make(B=4, T=2, K=64, V=32, dtype=torch.float32, state_v_first=v_first)
    states = torch.randn(9, *args["initial_state"].shape[1:]).to(pool_dtype)
    states[[1, 7]] = NAN
    pool = padded_pool(states, 12, math.pi)
    read = torch.tensor([5, -1, 0, 3], dtype=index_dtype)
    write = torch.tensor([5, 7, 6, -1], dtype=index_dtype)
    tokens = one_step(args, slice(None))
    o = delta_rule_step(
        **on_gpu(tokens), state=pool, read_idx=read.cuda(), write_idx=write.cuda(), state_v_first=v_first
    )
    active = [0, 2, 3]
    chosen = {n: t[active] for n, t in args.items()} | {"initial_state": states[[5, 0, 3]].clone()}
    truth, after = step_by_step(chosen, {"state_v_first": v_first}, torch.float64)
    eager, eager_after = step_by_step(chosen, {"state_v_first": v_first}, torch.float32)
    assert_step("o", o[active], truth, eager, chosen["initial_state"])
    assert (o[1] == 0).all()
    assert_step("state", pool[[5, 6]], after[-1, :2], eager_after[-1, :2], chosen["initial_state"])
    kept = [0, 2, 3, 4, 8]
    assert torch.equal(pool[kept].cpu(), states[kept])
    assert pool[[1, 7]].isnan().all()
    size = states[0].numel()
    behind = pool.as_strided((9, 12), (size + 12, 1), size)
    assert (behind == torch.tensor(math.pi).to(pool_dtype)).all()


@LAYOUTS
@POOLS
def test_step_state_per_token(pool_dtype: torch.dtype, v_first: bool) -> None:
    args = make(B=2, T=3, K=64, V=32, dtype=torch.float32, state_v_first=v_first)
    args["initial_state"] = args["initial_state"].to(pool_dtype)
    empty = torch.zeros(6, *args["initial_state"].shape[1:]).to(pool_dtype)
    pool = torch.cat([args["initial_state"], empty]).cuda()
    slots = torch.tensor([[2, 3, 4], [-1, 6, 7]])
    o = delta_rule_step(
        **on_gpu(one_step(args, slice(None))), state=pool, write_idx=slots.cuda(), state_v_first=v_first
    )
    truth, states = step_by_step(args, {"state_v_first": v_first}, torch.float64)
    eager, eager_states = step_by_step(args, {"state_v_first": v_first}, torch.float32)
    assert_step("o", o, truth, eager, args["initial_state"])
    for t in range(3):
        for b in range(2):
            if slots[b, t] >= 0:
                got = pool[slots[b, t]]
                assert_step(f"state {b},{t}", got, states[t, b], eager_states[t, b], args["initial_state"])
    assert torch.equal(pool[:2].cpu(), args["initial_state"])
    assert (pool[5] == 0).all()


@pytest.mark.parametrize("which", ["read", "write"])
def test_step_slot_out_of_range(which: str) -> None:
    """Cannot be reported without waiting for the device: the row gives NaN, no memory is touched."""
    args = make(B=3, T=2, K=32, V=32, dtype=torch.float32)
    pool = args["initial_state"].cuda()
    read, write = torch.tensor([0, 1, 2]).cuda(), torch.tensor([0, 1, 2]).cuda()
    (read if which == "read" else write)[1] = 3 if which == "write" else 1 << 40
    tokens = on_gpu(one_step(args, slice(None)))
    want_pool = pool.clone()
    want = delta_rule_step(**tokens, state=want_pool)
    o = delta_rule_step(**tokens, state=pool, read_idx=read, write_idx=write)
    assert o[1].isnan().all()
    assert torch.equal(o[[0, 2]], want[[0, 2]])
    assert torch.equal(pool[[0, 2]], want_pool[[0, 2]])
    assert torch.equal(pool[1].cpu(), args["initial_state"][1])


def test_step_of_views() -> None:
    """Any strides of the token tensors, as projections and caches leave them."""
    args = on_gpu(make(B=2, T=4, H=2, HV=2, K=64, V=64, gate="channel", dtype=torch.bfloat16))
    pool, same = args["initial_state"].clone(), args["initial_state"].clone()
    tokens = one_step(args, slice(None))
    want = delta_rule_step(**tokens, state=pool)
    packed = torch.stack([tokens[n] for n in ("q", "k", "v")], -1)
    heads_first = {n: tokens[n].transpose(1, 2).contiguous().transpose(1, 2) for n in ("beta", "g")}
    q, k, v = packed.unbind(-1)
    got = delta_rule_step(q, k, v, **heads_first, state=same)
    assert torch.equal(got, want)
    assert torch.equal(pool, same)


@LAYOUTS
def test_step_pool_beyond_32_bits(v_first: bool) -> None:
    slots = (1 << 31) // (4 * 128 * 128) + 3
    pool = torch.empty(slots, 4, 128, 128, device="cuda", dtype=torch.bfloat16)
    args = make(B=2, T=1, H=4, HV=4, K=128, V=128, dtype=torch.bfloat16, state_v_first=v_first)
    args["initial_state"] = args["initial_state"].bfloat16()
    pool[[slots - 1, slots - 2]] = args["initial_state"].cuda()
    assert pool.numel() > 2**31
    index = torch.tensor([slots - 1, slots - 2]).cuda()
    o = delta_rule_step(
        **on_gpu(one_step(args, slice(None))), state=pool, read_idx=index, state_v_first=v_first
    )
    truth, states = step_by_step(args, {"state_v_first": v_first}, torch.float64)
    eager, eager_states = step_by_step(args, {"state_v_first": v_first}, torch.float32)
    assert_step("o", o, truth, eager, args["initial_state"])
    assert_step("state", pool[index], states[-1], eager_states[-1], args["initial_state"])


def test_step_graph_and_side_stream() -> None:
    """A captured step follows index tensors that change between replays; a side stream is not waited for."""
    args = make(B=3, T=2, H=2, HV=4, K=128, V=128, dtype=torch.bfloat16)
    tokens = on_gpu(one_step(args, slice(None)))
    states = torch.randn(6, 4, 128, 128, device="cuda")
    read, write = torch.tensor([0, 1, 2]).cuda(), torch.tensor([3, 4, 5]).cuda()
    rounds = [([0, 1, 2], [3, 4, 5]), ([5, -1, 3], [0, 1, 2]), ([2, 0, 1], [2, -1, 1])]

    want = []
    pool = states.clone()
    for r, w in rounds:
        index = {"read_idx": torch.tensor(r).cuda(), "write_idx": torch.tensor(w).cuda()}
        want.append((delta_rule_step(**tokens, state=pool, **index), pool.clone()))

    pool = states.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = delta_rule_step(**tokens, state=pool, read_idx=read, write_idx=write)
    for (r, w), (want_o, want_pool) in zip(rounds, want, strict=True):
        read.copy_(torch.tensor(r))
        write.copy_(torch.tensor(w))
        o.fill_(NAN)
        graph.replay()
        assert torch.equal(o, want_o)
        assert torch.equal(pool, want_pool)

    pool = states.clone()
    read, write = (torch.tensor(slots).cuda() for slots in rounds[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        o = delta_rule_step(**tokens, state=pool, read_idx=read, write_idx=write)
        assert not stream.query(), "the launch waited for the stream"
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(o, want[0][0])


def test_step_opcheck_and_compile() -> None:
    args = on_gpu(make(B=2, T=2, K=64, V=64, dtype=torch.bfloat16))
    tokens, pool = one_step(args, slice(None)), args["initial_state"]
    q, k, v, beta, g = (tokens[n] for n in ("q", "k", "v", "beta", "g"))
    index = torch.tensor([1, 0], device="cuda")
    torch.library.opcheck(
        torch.ops.nearfield.delta_step.default,
        (q, k, v, beta, g, pool.clone(), index, index, None, None, 0.125, True, 1, 0, -5.0, False),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )

    def f(pool: Tensor) -> Tensor:
        return delta_rule_step(**tokens, state=pool, read_idx=index)

    plain, compiled = pool.clone(), pool.clone()
    want = f(plain)
    got = torch.compile(f, fullgraph=True)(compiled)
    assert torch.equal(got, want)
    assert torch.equal(plain, compiled)


@LAYOUTS
@POOLS
@pytest.mark.parametrize("gate", [*GATE_KINDS, "head-softplus", "channel-bounded"])
def test_speculation(gate: str, pool_dtype: torch.dtype, v_first: bool) -> None:
    check_speculation("cuda", torch.bfloat16, pool_dtype, gate, v_first)


def test_speculation_graph_and_range() -> None:
    """Captured once, replayed with other numbers of accepted tokens; an impossible number gives NaN."""
    args = on_gpu(make(B=3, T=4, H=1, HV=2, K=64, V=64, dtype=torch.bfloat16))
    draft, pool = one_step(args, slice(None)), args["initial_state"]
    _, pending = delta_rule_verify(**draft, state=pool)
    accepted = torch.tensor([0, 0, 0]).cuda()
    captured = pool.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, after = delta_rule_verify(**draft, state=captured, pending=pending, accepted=accepted)
    for numbers in ([0, 1, 4], [3, 2, 0], [4, 5, -1]):
        captured.copy_(pool)
        accepted.copy_(torch.tensor(numbers))
        graph.replay()
        plain = pool.clone()
        possible = [b for b, a in enumerate(numbers) if 0 <= a <= 4]
        for b in possible:
            if numbers[b]:
                prefix = {n: t[b : b + 1, : numbers[b]] for n, t in draft.items()}
                delta_rule_step(**prefix, state=plain, read_idx=torch.tensor([b]).cuda())
        assert torch.equal(captured, plain)
        want = delta_rule_step(**draft, state=plain)
        assert torch.equal(o[possible], want[possible])
        for b in {0, 1, 2} - set(possible):
            assert o[b].isnan().all()
            assert after.u[b].isnan().all()


def test_step_refuses() -> None:
    args = on_gpu(make(T=1, K=18, V=16, dtype=torch.float32))
    with pytest.raises(
        RuntimeError, match="head dims 18 of q and k and 16 of v; supported on CUDA: multiples of 4"
    ):
        delta_rule_step(**one_step(args, slice(None)), state=args["initial_state"])
    args = on_gpu(make(T=1, K=16, V=16))
    with pytest.raises(RuntimeError, match="q has dtype Double; supported on CUDA: float32"):
        delta_rule_step(**one_step(args, slice(None)), state=args["initial_state"])
    args = on_gpu(make(T=1, K=16, V=16, dtype=torch.float32))
    states = args["initial_state"]
    with pytest.raises(RuntimeError, match="state is not aligned"):
        delta_rule_step(**one_step(args, slice(None)), state=padded_pool(states, 2, 0.0))


# ----------------------------------------------------------------------------------- local linear attention

# Relative Frobenius errors that 16-bit inputs may have against a float64 solve, by the ridge over the keys' variance.
L2_16BIT = {1.0: 3e-3, 0.1: 6e-3}


def same_dtype(q: Tensor, k: Tensor, v: Tensor, lam: Tensor | float, **options: Any) -> Tensor:
    """The definition in PyTorch with every tensor in q's dtype, but for the solve, which has no 16-bit form."""
    solve = torch.linalg.solve

    def wide_solve(a: Tensor, b: Tensor) -> Tensor:
        return solve(a.float(), b.float()).to(a.dtype)

    try:
        torch.linalg.solve = wide_solve
        return lla.local_linear_attention(q, k, v, lam=lam, **options)[0]
    finally:
        torch.linalg.solve = solve


def check_lla(
    what: str, got: Tensor, q: Tensor, k: Tensor, v: Tensor, lam: Tensor | float, limit: float, **options: Any
) -> None:
    wide = lam.double() if isinstance(lam, Tensor) else lam
    truth = lla.local_linear_attention(q.double(), k.double(), v.double(), lam=wide, **options)[0]
    narrow = lam.to(q.dtype) if isinstance(lam, Tensor) else lam
    eager = same_dtype(q, k, v, narrow, **options)
    if eager.isfinite().all():  # products of large keys overflow float16 there
        assert_accurate(what, got, truth, eager)
    error, size = float((got.double() - truth).norm()), float(truth.norm())
    assert error <= limit * size, f"{what}: relative error {error / size:.3g} > {limit}"


LLA_DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
LLA_CASES = [
    Case(B=1, m=1, n=1, Hq=1, Hk=1, d=64, dv=64),
    Case(B=2, m=1, n=64, Hq=2, Hk=2, d=64, dv=64),
    Case(B=2, m=1, n=63, Hq=2, Hk=2, d=32, dv=32),
    Case(B=1, m=1, n=65, Hq=1, Hk=1, d=128, dv=128),
    Case(B=3, m=2, n=200, Hq=4, Hk=2, d=64, dv=64),
    Case(B=2, m=1, n=3000, Hq=2, Hk=2, d=64, dv=64),
    Case(B=1, m=4, n=5000, Hq=4, Hk=1, d=128, dv=128),
    Case(B=1, m=1, n=9000, Hq=1, Hk=1, d=32, dv=32),
    Case(B=2, m=3, n=700, Hq=3, Hk=1, d=40, dv=24),
    Case(B=2, m=1, n=1500, Hq=2, Hk=1, d=64, dv=128),
    Case(B=1, m=1, n=600, Hq=2, Hk=2, d=96, dv=72),
    Case(B=1, m=2, n=2000, Hq=2, Hk=2, d=32, dv=104, window=1000),
    Case(B=2, m=8, n=300, Hq=2, Hk=2, d=64, dv=64, window=33),
    Case(B=3, m=1, n=2500, Hq=8, Hk=8, d=64, dv=64),
    Case(B=1, m=2, n=20000, Hq=2, Hk=2, d=64, dv=64),
    Case(B=5, m=1, n=2100, Hq=4, Hk=2, d=128, dv=128),
]


@LLA_DTYPES
@pytest.mark.parametrize("ridge", ["relative", "absolute"])
@pytest.mark.parametrize("case", LLA_CASES, ids=str)
def test_lla_step(case: Case, ridge: str, dtype: torch.dtype) -> None:
    q, k, v, _ = (t.cuda() if isinstance(t, Tensor) else t for t in draw(case).cast(dtype))
    lam = 1.0 if ridge == "relative" else float(case.n)
    options: dict[str, Any] = {"window": case.window, "ridge": ridge}
    got = local_linear_attention_step(q, k, v, lam=lam, **options)
    assert got.dtype == dtype
    check_lla("o", got, q, k, v, lam, L2_16BIT[1.0], **options)


@LLA_DTYPES
@pytest.mark.parametrize("mode", LAMS)
def test_lla_step_ridge_modes(mode: str, dtype: torch.dtype) -> None:
    case = Case(B=2, m=2, n=1100, Hq=4, Hk=2, d=64, dv=64)
    q, k, v, _ = (t.cuda() if isinstance(t, Tensor) else t for t in draw(case).cast(dtype))
    lam = LAMS[mode](case).cuda().float()
    check_lla("o", local_linear_attention_step(q, k, v, lam=lam), q, k, v, lam, L2_16BIT[0.1])


@LLA_DTYPES
@pytest.mark.parametrize("lam", [1.0, 0.1])
@pytest.mark.parametrize("n", [0, 700])
@pytest.mark.parametrize("name", HOSTILE)
def test_lla_step_hostile(name: str, n: int, lam: float, dtype: torch.dtype) -> None:
    make_inputs, few, d = HOSTILE[name]
    inputs = make_inputs(n or few, 64 if n else d).cast(dtype)
    q, k, v = (t.cuda() for t in inputs[:3])
    q = q[:, -8:]  # decoding: the last queries
    got = local_linear_attention_step(q, k, v, lam=lam, scale=inputs.scale)
    check_lla("o", got, q, k, v, lam, L2_16BIT[lam], scale=inputs.scale)


@pytest.mark.parametrize(
    "dtype, factor",
    [(torch.bfloat16, 1e-6), (torch.bfloat16, 1e6), (torch.float16, 0.05), (torch.float16, 30.0)],
)
@pytest.mark.parametrize("outlier", [None, 0, 500])
def test_lla_step_magnitudes(outlier: int | None, dtype: torch.dtype, factor: float) -> None:
    """Keys and values far from one, and one key and value 20 times the others, seen first or late."""
    q, k, v, scale = draw(Case(B=1, m=1, n=700, Hq=2, Hk=2, d=64, dv=64))
    k, v = k * factor, v / factor
    if outlier is not None:
        k[:, outlier] *= 20
        v[:, outlier] *= 20
    q, k, v = (t.cuda().to(dtype) for t in (q * factor, k, v))
    options = {"scale": scale / factor**2}
    got = local_linear_attention_step(q, k, v, lam=factor**2, **options)
    check_lla("o", got, q, k, v, factor**2, L2_16BIT[1.0], **options)


@LLA_DTYPES
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=name_of)
@pytest.mark.parametrize("n, m", [(1100, 3), (2600, 1)], ids=["clusters of 3", "clusters of 7"])
def test_lla_step_lengths(
    n: int, m: int, index_dtype: torch.dtype, window: int | None, dtype: torch.dtype
) -> None:
    """Rubbish behind the filled length is not read; short sequences leave splits without keys."""
    lengths = [n, 3, 0, 64, 1, 700]
    case = Case(B=6, m=m, n=n, Hq=4, Hk=2, d=64, dv=64)
    q, k, v = (t.cuda() for t in draw(case).cast(dtype)[:3])
    for b, length in enumerate(lengths):
        k[b, length:], v[b, length:] = NAN, NAN
    index = torch.tensor(lengths, dtype=index_dtype, device="cuda")
    got = local_linear_attention_step(q, k, v, lam=1.0, cache_seqlens=index, window=window)
    for b, length in enumerate(lengths):
        if length == 0:
            assert (got[b] == 0).all()
            continue
        part = [q[b : b + 1], k[b : b + 1, :length], v[b : b + 1, :length]]
        check_lla(f"o[{b}]", got[b : b + 1], *part, 1.0, L2_16BIT[1.0], window=window)


@pytest.mark.parametrize("n", [40, 1300, 15000])
@pytest.mark.parametrize("d", [32, 64])
def test_lla_step_impossible_length(d: int, n: int) -> None:
    case = Case(B=3, m=1, n=n, d=d, dv=d)
    q, k, v = (t.cuda() for t in draw(case).cast(torch.bfloat16)[:3])
    for wrong in (n + 1, -1, 1 << 40):
        lengths = torch.tensor([n, wrong, n], device="cuda")
        got = local_linear_attention_step(q, k, v, lam=1.0, cache_seqlens=lengths)
        assert got[1].isnan().all()
        assert torch.equal(got[[0, 2]], local_linear_attention_step(q, k, v, lam=1.0)[[0, 2]])


@LLA_DTYPES
def test_lla_step_equals_prefill(dtype: torch.dtype) -> None:
    """Token by token against the definition on the whole sequence."""
    case = Case(B=2, m=90, n=90, Hq=4, Hk=2, d=64, dv=64)
    q, k, v = (t.cuda() for t in draw(case).cast(dtype)[:3])
    steps = [
        local_linear_attention_step(
            q[:, t : t + 1], k, v, lam=1.0, cache_seqlens=torch.full((2,), t + 1, device="cuda"), window=40
        )
        for t in range(90)
    ]
    check_lla("o", torch.cat(steps, 1), q, k, v, 1.0, L2_16BIT[1.0], window=40)


def test_lla_step_of_views() -> None:
    """A cache laid out heads first, and keys and values interleaved."""
    q, k, v = (t.cuda() for t in draw(Case(B=2, m=1, n=500, Hq=4, Hk=4, d=64, dv=64)).cast(torch.float16)[:3])
    want = local_linear_attention_step(q, k, v, lam=0.5)
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v)]
    assert torch.equal(local_linear_attention_step(q, *heads_first, lam=0.5), want)
    packed = torch.stack([k, v], 3)
    assert torch.equal(local_linear_attention_step(q, *packed.unbind(3), lam=0.5), want)


def test_lla_step_cache_beyond_32_bits() -> None:
    n = (1 << 31) // (8 * 64) + 100
    k = torch.zeros(1, n, 8, 64, device="cuda", dtype=torch.bfloat16)
    v = torch.zeros_like(k)
    assert k.numel() > 2**31
    last = draw(Case(B=1, m=1, n=300, Hq=8, Hk=8, d=64, dv=64)).cast(torch.bfloat16)
    q = last.q.cuda()
    k[:, -300:], v[:, -300:] = last.k.cuda(), last.v.cuda()
    got = local_linear_attention_step(q, k, v, lam=1.0, window=300)
    check_lla("o", got, q, k[:, -300:], v[:, -300:], 1.0, L2_16BIT[1.0])


@pytest.mark.parametrize("n", [100, 1300, 15000], ids=["whole", "cluster", "split"])
def test_lla_step_graph_and_side_stream(n: int) -> None:
    q, k, v = (t.cuda() for t in draw(Case(B=2, m=1, n=n, d=64, dv=64)).cast(torch.bfloat16)[:3])
    lengths, lam = torch.tensor([n, n], device="cuda"), torch.tensor(0.5, device="cuda")
    rounds = [[n, n], [5, n - 1], [0, 64], [n // 2, n]]
    want = [
        local_linear_attention_step(q, k, v, lam=lam, cache_seqlens=torch.tensor(r, device="cuda"))
        for r in rounds
    ]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = local_linear_attention_step(q, k, v, lam=lam, cache_seqlens=lengths)
    for r, expected in zip(rounds, want, strict=True):
        lengths.copy_(torch.tensor(r))
        o.fill_(NAN)
        graph.replay()
        assert torch.equal(o, expected)
    lengths.fill_(n)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        o = local_linear_attention_step(q, k, v, lam=lam, cache_seqlens=lengths)
        assert not stream.query(), "the launch waited for the stream"
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(o, want[0])


def test_lla_step_opcheck_and_compile() -> None:
    q, k, v = (t.cuda() for t in draw(Case(B=2, m=1, n=70, d=64, dv=64)).cast(torch.bfloat16)[:3])
    lengths, lam = torch.tensor([70, 9], device="cuda"), torch.full((2, 1, 2, 1), 0.5, device="cuda")
    torch.library.opcheck(
        torch.ops.nearfield.lla_step.default,
        (q, k, v, lengths, lam, 0.125, 20, False),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )

    def f(q: Tensor) -> Tensor:
        return local_linear_attention_step(q, k, v, lam=0.5, cache_seqlens=lengths)

    assert torch.equal(torch.compile(f, fullgraph=True)(q), f(q))


def test_lla_step_refuses() -> None:
    def call(d: int, dv: int, dtype: torch.dtype, pad: int = 0) -> None:
        inputs = draw(Case(B=1, m=1, n=9, d=d + pad, dv=dv)).cast(dtype)
        q, k, v = (t.cuda() for t in inputs[:3])
        local_linear_attention_step(q[..., :d], k[..., :d], v, lam=1.0)

    with pytest.raises(RuntimeError, match="q has dtype Float; supported on CUDA: bfloat16, float16"):
        call(64, 64, torch.float32)
    with pytest.raises(RuntimeError, match="head dims 60 of q and k_cache and 64 of v_cache"):
        call(60, 64, torch.bfloat16)
    with pytest.raises(RuntimeError, match="head dims 136 of q and k_cache and 64 of v_cache"):
        call(136, 64, torch.bfloat16)
    with pytest.raises(RuntimeError, match="k_cache has strides"):
        call(64, 64, torch.bfloat16, pad=4)
