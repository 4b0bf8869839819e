"""What the delta rule refuses, and how it names the argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from delta_cases import make, one_step, operator_arguments
from nearfield.delta import delta_rule, delta_rule_step

BAD_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "q-rank": ({"q": torch.zeros(2, 8, 24)}, ValueError, r"q has shape \[2, 8, 24\]"),
    "k-shape": ({"k": torch.zeros(2, 8, 2, 20)}, ValueError, r"k has shape \[2, 8, 2, 20\]"),
    "v-tokens": ({"v": torch.zeros(2, 9, 2, 16)}, ValueError, r"v has shape \[2, 9, 2, 16\]"),
    "v-heads": ({"v": torch.zeros(2, 8, 3, 16)}, ValueError, "v has 3 heads, expected a multiple of q's 2"),
    "no-channels": ({"v": torch.zeros(2, 8, 2, 0)}, ValueError, "v has 0 channels"),
    "beta-shape": ({"beta": torch.zeros(2, 8)}, ValueError, r"beta has shape \[2, 8\]"),
    "g-shape": ({"g": torch.zeros(2, 8, 2, 16)}, ValueError, r"g has shape \[2, 8, 2, 16\]"),
    "k-dtype": ({"k": torch.zeros(2, 8, 2, 24).double()}, ValueError, "k has dtype torch.float64"),
    "q-dtype": ({"q": torch.zeros(2, 8, 2, 24).long()}, NotImplementedError, "q has dtype torch.int64"),
    "g-dtype": ({"g": torch.zeros(2, 8, 2).double()}, ValueError, "g has dtype torch.float64"),
    "beta-type": ({"beta": 0.5}, TypeError, "beta must be a torch.Tensor, got float"),
    "activation": (
        {"beta_activation": "tanh"},
        ValueError,
        "beta_activation is 'tanh'; supported: none, sigmoid",
    ),
    "gate-name": ({"gate": "exp"}, ValueError, "gate is 'exp'; supported: log, softplus, bounded"),
    "gate-without-g": ({"gate": "bounded", "g": None}, ValueError, "gate is 'bounded', but g is None"),
    "softplus-without-A": ({"gate": "softplus"}, ValueError, "needs A_log, but A_log is None"),
    "log-with-A": ({"A_log": torch.zeros(2)}, ValueError, "gate is 'log'"),
    "A-shape": ({"gate": "softplus", "A_log": torch.zeros(3)}, ValueError, r"A_log has shape \[3\]"),
    "bias-shape": (
        {"gate": "bounded", "dt_bias": torch.zeros(2, 24)},
        ValueError,
        r"dt_bias has shape \[2, 24\]",
    ),
    "bound": ({"gate": "bounded", "gate_bound": -7.0}, ValueError, "gate_bound is -7.0"),
    "device": ({"k": torch.zeros(2, 8, 2, 24, device="meta")}, ValueError, "k is on meta, but q is on cpu"),
}
BAD_FORWARD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "state-shape": (
        {"initial_state": torch.zeros(2, 2, 16, 24)},
        ValueError,
        r"initial_state has shape \[2, 2, 16, 24\]",
    ),
    "state-dtype": (
        {"initial_state": torch.zeros(2, 2, 24, 16).half()},
        ValueError,
        "initial_state has dtype torch.float16",
    ),
    "packed-batch": ({"cu_seqlens": torch.tensor([0, 8])}, ValueError, "q has batch 2"),
    "cu-dtype": ({"cu_seqlens": torch.tensor([0.0, 8.0])}, ValueError, "cu_seqlens has dtype torch.float32"),
    "cu-rank": ({"cu_seqlens": torch.tensor([[0, 8]])}, ValueError, r"cu_seqlens has shape \[1, 2\]"),
    "cu-empty": ({"cu_seqlens": torch.zeros(0).long()}, ValueError, r"cu_seqlens has shape \[0\]"),
}
BAD_STEP: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "pool-shape": ({"state": torch.zeros(2, 2, 16, 24)}, ValueError, r"state has shape \[2, 2, 16, 24\]"),
    "pool-dtype": ({"state": torch.zeros(2, 2, 24, 16).half()}, ValueError, "state has dtype torch.float16"),
    "few-slots": ({"state": torch.zeros(1, 2, 24, 16)}, ValueError, "state has 1 slots"),
    "read-shape": ({"read_idx": torch.zeros(3).long()}, ValueError, r"read_idx has shape \[3\]"),
    "write-shape": ({"write_idx": torch.zeros(2, 7).long()}, ValueError, r"write_idx has shape \[2, 7\]"),
    "index-dtype": ({"read_idx": torch.zeros(2)}, ValueError, "read_idx has dtype torch.float32"),
    "read-range": (
        {"read_idx": torch.tensor([0, 2])},
        RuntimeError,
        "read_idx has slot 2, but the pool has 2",
    ),
    "write-range": ({"write_idx": torch.tensor([0, 9])}, RuntimeError, "write_idx has slot 9"),
    "pool-strides": (
        {"state": torch.zeros(2, 2, 16, 24).transpose(-1, -2)},
        RuntimeError,
        r"state has strides \[768, 384, 1, 24\]",
    ),
    "requires-grad": ({"q": torch.zeros(2, 8, 2, 24, requires_grad=True)}, ValueError, "has no gradient"),
}


@pytest.mark.parametrize("name", [*BAD_CALLS, *BAD_FORWARD])
def test_bad_call(name: str) -> None:
    changes, error, message = (BAD_CALLS | BAD_FORWARD)[name]
    with pytest.raises(error, match=f"^delta_rule: .*{message}"):
        delta_rule(**make(T=8, dtype=torch.float32) | changes)


@pytest.mark.parametrize("name", [*BAD_CALLS, *BAD_STEP])
def test_bad_step(name: str) -> None:
    changes, error, message = (BAD_CALLS | BAD_STEP)[name]
    args = one_step(make(T=8, dtype=torch.float32), slice(0, 8)) | {"state": torch.zeros(2, 2, 24, 16)}
    with pytest.raises(error, match=f"delta_.*step: .*{message}"):
        delta_rule_step(**args | changes)


def test_step_length() -> None:
    with pytest.raises(ValueError, match="q has 9 tokens; supported: 1 to 8"):
        delta_rule_step(
            **one_step(make(T=9), slice(0, 9)), state=torch.zeros(2, 2, 24, 16, dtype=torch.float64)
        )


@pytest.mark.parametrize(
    "bounds, message",
    [
        ([1, 8], "starts with 1"),
        ([0, 5, 3, 8], "decreases from 5 to 3"),
        ([0, 9], "ends with 9, but there are 8"),
    ],
    ids=["start", "order", "end"],
)
def test_bad_sequence_bounds(bounds: list[int], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"cu_seqlens {message}"):
        delta_rule(**make(B=1, T=8, initial=False), cu_seqlens=torch.tensor(bounds))


@pytest.mark.parametrize("name", ["k", "v", "beta", "g", "initial_state", "A_log", "dt_bias", "cu_seqlens"])
def test_operators_check_shapes_themselves(name: str) -> None:
    """A direct call cannot make the kernels read foreign memory."""
    args = make(B=1, T=8) | {"A_log": torch.zeros(2).double(), "dt_bias": torch.zeros(2).double()}
    wrong = (
        torch.zeros(0, dtype=torch.int64) if name == "cu_seqlens" else torch.zeros(1, 3, dtype=torch.float64)
    )
    message = "cu_seqlens is empty" if name == "cu_seqlens" else rf"{name} has shape \[1, 3\]"
    arguments = operator_arguments(args, gate=1, **{name: wrong})
    with pytest.raises(RuntimeError, match=f"delta_fwd: {message}"):
        torch.ops.nearfield.delta_fwd(*arguments, True)
    with pytest.raises(RuntimeError, match=f"delta_bwd: {message}"):
        torch.ops.nearfield.delta_bwd(None, None, *arguments)
