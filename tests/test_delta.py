"""The delta rule against its token recurrence in float64: accuracy, lengths, options."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from delta_cases import (
    DTYPES,
    FLOAT32_REPEATED_FACTOR,
    GATE_KINDS,
    LEAVES,
    check,
    hostile_gates,
    make,
    name_of,
    run,
)
from delta_chunks import delta_rule_by_chunks
from hypothesis import given
from hypothesis import strategies as st
from nearfield.delta import delta_rule, delta_rule_reference


@pytest.mark.parametrize("function", [delta_rule, delta_rule_reference])
def test_memory_by_hand(function: Any) -> None:
    """Write two values under two keys, overwrite the first, forget half, read by key: small exact numbers."""
    e = torch.eye(2, dtype=torch.float64)
    k = e[[0, 1, 0, 1]].reshape(1, 4, 1, 2)
    v = torch.tensor([[3.0], [5.0], [7.0], [0.0]], dtype=torch.float64).reshape(1, 4, 1, 1)
    q = e[[0, 1, 0, 0]].reshape(1, 4, 1, 2)
    beta = torch.tensor([1.0, 1.0, 0.5, 0.0], dtype=torch.float64).reshape(1, 4, 1)
    g = torch.tensor([0.0, 0.0, 0.0, math.log(0.5)], dtype=torch.float64).reshape(1, 4, 1)
    o, state = function(q, k, v, beta, g, scale=1.0, output_final_state=True)
    # 3 and 5 are stored; half of the error of 3 to 7 is written, giving 5; half of everything is forgotten.
    torch.testing.assert_close(o.flatten(), torch.tensor([3.0, 5.0, 5.0, 2.5], dtype=torch.float64))
    torch.testing.assert_close(state.flatten(), torch.tensor([2.5, 2.5], dtype=torch.float64))


@pytest.mark.parametrize("gates", ["mild", "-5", "mixed", "one-inf"])
@pytest.mark.parametrize("gate", GATE_KINDS)
def test_reference_by_chunks(gate: str, gates: str) -> None:
    """The reference of the GPU tests equals the definition."""
    args = make(T=200, HV=4, gate=gate)
    if gate != "none" and gates != "mild":
        args["g"] = hostile_gates(gates, args["g"].shape).double()
    got = delta_rule_by_chunks(**args, output_final_state=True)
    want = delta_rule_reference(**args, output_final_state=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("gate", GATE_KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=name_of)
@pytest.mark.parametrize(
    "shape",
    [(2, 130, 2, 2, 32, 32), (1, 100, 1, 2, 60, 100)],
    ids=["B2-T130-H2-D32", "B1-T100-H1-HV2-K60-V100"],
)
def test_matches_recurrence(shape: tuple[int, ...], dtype: torch.dtype, gate: str) -> None:
    check(make(*shape, gate=gate, dtype=dtype))


@pytest.mark.parametrize("gate", GATE_KINDS)
@pytest.mark.parametrize("T", [0, 1, 15, 16, 17, 63, 64, 65, 127])
def test_lengths(T: int, gate: str) -> None:
    check(make(T=T, gate=gate))
    check(make(T=T, gate=gate, dtype=torch.float32, initial=False))


def test_zero_size_batch() -> None:
    o, state = delta_rule(**make(B=0, T=5), output_final_state=True)
    assert o.shape == (0, 5, 2, 16)
    assert state.shape == (0, 2, 24, 16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("gate_kind", ["head", "channel"])
@pytest.mark.parametrize("option", ["softplus", "softplus-bias", "bounded", "bounded-A", "bounded-A-bias"])
def test_fused_gates(option: str, gate_kind: str, dtype: torch.dtype) -> None:
    HV, K = 4, 24
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    args: dict[str, Any] = make(H=2, HV=HV, K=K, gate=gate_kind, dtype=dtype)
    args["g"] = torch.randn(args["g"].shape, dtype=wide)
    args["gate"] = option.split("-")[0]
    if "softplus" in option or "A" in option:
        args["A_log"] = 0.5 * torch.randn(HV, dtype=wide)
    if "bias" in option:
        args["dt_bias"] = torch.randn(*((HV, K) if gate_kind == "channel" else (HV,)), dtype=wide)
    args["gate_bound"] = -3.0
    check(args)


def test_flat_channel_bias() -> None:
    args: dict[str, Any] = make(gate="channel") | {"gate": "bounded"}
    bias = torch.randn(2, 24, dtype=torch.float64)
    assert torch.equal(delta_rule(**args, dt_bias=bias)[0], delta_rule(**args, dt_bias=bias.flatten())[0])


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=name_of)
@pytest.mark.parametrize("activation", ["none", "sigmoid", "sigmoid2"])
def test_fused_norm_and_beta(activation: str, dtype: torch.dtype) -> None:
    args: dict[str, Any] = make(dtype=dtype, HV=4)
    args["q"], args["k"] = 3 * args["q"], 5 * args["k"]
    if activation != "none":
        args["beta"] = torch.randn(args["beta"].shape, dtype=args["beta"].dtype)
    check(args | {"use_qk_l2norm": True, "beta_activation": activation})


def test_scale() -> None:
    args = make()
    check(args | {"scale": 0.7})
    default = delta_rule(**args)[0]
    assert torch.equal(default, delta_rule(**args, scale=24**-0.5)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_small_tensors_in_16_bit(dtype: torch.dtype) -> None:
    """beta, g and their parameters may have q's dtype; their gradients come back in it."""
    args: dict[str, Any] = make(gate="channel", dtype=dtype)
    args |= {"A_log": torch.randn(2), "dt_bias": torch.randn(2, 24), "gate": "softplus"}
    for name in ("beta", "g", "A_log", "dt_bias"):
        args[name] = args[name].to(dtype)
    check(args)


@pytest.mark.parametrize("HV", [1, 2, 4, 8])
@pytest.mark.parametrize("gate", GATE_KINDS)
def test_grouped_value_heads(HV: int, gate: str) -> None:
    args = make(B=1, T=70, H=1, HV=HV, gate=gate)
    got = check(args)
    repeated = args | {name: args[name].repeat_interleave(HV, 2) for name in ("q", "k")}
    assert torch.equal(delta_rule(**repeated)[0], got["o"])


def test_gate_of_one_channel_is_a_gate_per_head() -> None:
    """K = 1 with a gate per channel and a gate per head are the same recurrence."""
    args = make(K=1, V=8, gate="channel")
    d_o = torch.randn(2, 100, 2, 8, dtype=torch.float64)
    channel = run(delta_rule, args, d_o, None, None)
    head = run(delta_rule, args | {"g": args["g"][..., 0]}, d_o, None, None)
    for name, value in head.items():
        torch.testing.assert_close(channel[name].view_as(value), value, rtol=1e-11, atol=1e-12)


def test_causal() -> None:
    args = make(T=130, gate="channel")
    want = delta_rule(**args)[0][:, :70]
    for name in ("q", "k", "v", "beta", "g"):
        args[name][:, 70:] *= 0.5
    assert torch.equal(delta_rule(**args)[0][:, :70], want)


@given(
    data=st.data(),
    T=st.integers(0, 140),
    H=st.integers(1, 3),
    group=st.integers(1, 3),
    K=st.integers(1, 40),
    V=st.integers(1, 70),
    gate=st.sampled_from(["none", "log", "softplus", "bounded"]),
    per_channel=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    l2norm=st.booleans(),
    activation=st.sampled_from(["none", "sigmoid", "sigmoid2"]),
    v_first=st.booleans(),
    initial=st.booleans(),
    only=st.sampled_from([None, "o", "state"]),
)
def test_any_shape_and_option(
    data: st.DataObject, T: int, H: int, group: int, K: int, V: int, gate: str, per_channel: bool,
    dtype: torch.dtype, l2norm: bool, activation: str, v_first: bool, initial: bool, only: str | None,
) -> None:  # fmt: skip
    torch.manual_seed(T * 1000 + K)
    cuts = data.draw(st.none() | st.lists(st.integers(0, T), max_size=4))
    kind = "none" if gate == "none" else "channel" if per_channel else "head"
    HV = H * group
    bounds = None if cuts is None else [0, *sorted(cuts)]
    N = None if bounds is None else len(bounds) - 1
    B = 2 if bounds is None else 1
    args: dict[str, Any] = make(
        B, T, H, HV, K, V, gate=kind, dtype=dtype, initial=initial, sequences=N, state_v_first=v_first
    )
    if gate in ("softplus", "bounded"):
        args |= {"gate": gate, "A_log": torch.randn(HV, dtype=dtype), "gate_bound": -2.0}
        args["dt_bias"] = torch.randn(*((HV, K) if per_channel else (HV,)), dtype=dtype)
    if bounds is not None:
        args["cu_seqlens"] = torch.tensor(bounds)
    args |= {"use_qk_l2norm": l2norm, "beta_activation": activation, "state_v_first": v_first}
    # With few channels keys repeat; with few elements a sum over K and V terms of order one can cancel.
    factor = FLOAT32_REPEATED_FACTOR if dtype == torch.float32 else None
    check(args, only=only, factor=factor, scales=dict.fromkeys(("o", "final_state", *LEAVES), (K * V) ** 0.5))
