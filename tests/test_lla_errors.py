"""What local linear attention refuses, and how it names the argument."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from nearfield.lla import local_linear_attention, local_linear_attention_step, probe_attention

ops = torch.ops.nearfield
Q, K, V = torch.randn(2, 5, 4, 8), torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, 6)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"q": Q[0]}, ValueError, r"q has shape \[5, 4, 8\]"),
        ({"q": Q[..., :0]}, ValueError, r"q has shape \[2, 5, 4, 0\]"),
        ({"k": K[..., :4]}, ValueError, r"k has shape \[2, 7, 2, 4\]"),
        ({"k": K[:1]}, ValueError, r"k has shape \[1, 7, 2, 8\]"),
        ({"v": V[:, :3]}, ValueError, r"v has shape \[2, 3, 2, 6\]"),
        ({"v": V[:, :, :1]}, ValueError, r"v has shape \[2, 7, 1, 6\]"),
        ({"q": Q[:, :, :3]}, ValueError, "q has 3 heads, expected a multiple of the 2"),
        ({"k": K.double()}, ValueError, "k has dtype torch.float64, but q has torch.float32"),
        ({"q": Q.int(), "k": K.int(), "v": V.int()}, NotImplementedError, "q has dtype torch.int32"),
        ({"k": [1.0]}, TypeError, "k must be a torch.Tensor, got list"),
        ({"v": V.to("meta")}, ValueError, "v is on meta, but q is on cpu"),
        ({"q": Q.to_sparse()}, NotImplementedError, "q is a sparse"),
        ({"lam": 0.0}, ValueError, "lam is 0.0, expected a finite number > 0"),
        ({"lam": -1}, ValueError, "lam is -1"),
        ({"lam": math.inf}, ValueError, "lam is inf"),
        ({"lam": math.nan}, ValueError, "lam is nan"),
        ({"lam": "big"}, TypeError, "lam must be a float or a torch.Tensor, got str"),
        ({"lam": torch.ones(3)}, ValueError, r"lam has shape \[3\], expected \[\], \[4\] per head"),
        ({"lam": torch.ones(8, 4)}, ValueError, r"lam has shape \[8, 4\]"),
        ({"lam": torch.ones(2, 4, 5)}, ValueError, r"lam has shape \[2, 4, 5\]"),
        ({"lam": torch.ones((), dtype=torch.int64)}, NotImplementedError, "lam has dtype torch.int64"),
        ({"lam": torch.ones((), device="meta")}, ValueError, "lam is on meta, but q is on cpu"),
        ({"scale": "1"}, TypeError, "scale must be a float, got str"),
        ({"scale": math.nan}, ValueError, "scale is nan"),
        ({"window": 0}, ValueError, "window is 0"),
        ({"window": 2.5}, ValueError, "window is 2.5"),
        ({"tol": -1.0}, ValueError, "tol is -1.0"),
        ({"tol": math.nan}, ValueError, "tol is nan"),
        ({"max_iters": 0}, ValueError, "max_iters is 0"),
        ({"max_iters": 3.5}, ValueError, "max_iters is 3.5"),
        ({"ridge": "both"}, ValueError, "ridge is 'both', expected 'relative' or 'absolute'"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"q": Q, "k": K, "v": V, "lam": 1.0} | changes
    with pytest.raises(error, match="local_linear_attention: " + message):
        local_linear_attention(**arguments)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (
            {"x": Q[..., :4]},
            ValueError,
            r"x has shape \[2, 5, 4, 4\], expected the shape of q, \[2, 5, 4, 8\]",
        ),
        ({"x": Q.int()}, NotImplementedError, "x has dtype torch.int32"),
        ({"x": 1.0}, TypeError, "x must be a torch.Tensor, got float"),
        ({"window": -1}, ValueError, "window is -1"),
    ],
)
def test_bad_probe_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="probe_attention: " + message):
        probe_attention(**({"q": Q, "x": Q, "k": K, "v": V} | changes))


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"k_cache": K[:1]}, ValueError, r"k_cache has shape \[1, 7, 2, 8\]"),
        ({"v_cache": V[:, 1:]}, ValueError, r"v_cache has shape \[2, 6, 2, 6\]"),
        ({"cache_seqlens": torch.ones(3, dtype=torch.int32)}, ValueError, r"cache_seqlens has shape \[3\]"),
        ({"cache_seqlens": torch.ones(2)}, ValueError, "cache_seqlens has dtype torch.float32"),
        ({"cache_seqlens": [1, 2]}, TypeError, "cache_seqlens must be a torch.Tensor, got list"),
        ({"lam": torch.ones(5)}, ValueError, r"lam has shape \[5\]"),
    ],
)
def test_bad_step_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="local_linear_attention_step: " + message):
        local_linear_attention_step(**({"q": Q, "k_cache": K, "v_cache": V, "lam": 1.0} | changes))


@pytest.mark.parametrize("length", [-1, 8])
def test_cache_length_outside_the_cache(length: int) -> None:
    with pytest.raises(RuntimeError, match=rf"cache_seqlens\[1\] is {length}, expected 0 to 7"):
        local_linear_attention_step(Q, K, V, lam=1.0, cache_seqlens=torch.tensor([7, length]))


def test_direct_calls_are_checked_too() -> None:
    lam = torch.ones(2, 5, 4, 1)
    good = (Q, K, V, lam, None, 1.0, True, None, False, 1e-3, 8)
    o, x, kbar, lse, _, _ = ops.lla_fwd(*good)
    for at, bad, message in [
        (0, Q[0], "q has shape"),
        (1, K[:1], "k has shape"),
        (2, V[:, :2], "v has shape"),
        (2, V.double(), "v has dtype"),
        (3, lam[..., 0], "lam has shape"),
        (3, lam.expand(2, 5, 4, 3), "lam has 3 channels"),
        (3, lam.double(), "lam has dtype"),
        (4, torch.tensor([0, 5]), "cu_seqlens needs a batch of 1, got 2"),
        (4, torch.zeros(2), "cu_seqlens has dtype"),
        (7, 0, "window is 0"),
    ]:
        with pytest.raises(RuntimeError, match=f"lla_fwd: {message}"):
            ops.lla_fwd(*good[:at], bad, *good[at + 1 :])
    saved = (o, Q, K, V, lam, x, kbar, lse)
    for at, name in [(0, "d_o"), (5, "x"), (6, "kbar"), (7, "lse")]:
        with pytest.raises(RuntimeError, match=f"lla_bwd: {name} has shape"):
            ops.lla_bwd(*saved[:at], saved[at][:, :2], *saved[at + 1 :], *good[4:])
    with pytest.raises(RuntimeError, match="lla_probe_fwd: x has shape"):
        ops.lla_probe_fwd(Q, x[:, :2], K, V, None, 1.0, True, None)
    with pytest.raises(RuntimeError, match="lla_probe_fwd: x has shape"):
        ops.lla_probe_fwd(Q, Q[:, :2], K, V, None, 1.0, True, None)
    with pytest.raises(RuntimeError, match="lla_probe_fwd: x has dtype"):
        ops.lla_probe_fwd(Q, x.to(torch.int32), K, V, None, 1.0, True, None)
