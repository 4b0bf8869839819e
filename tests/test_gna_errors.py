"""What neighborhood attention refuses, and how it names the argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nearfield import neighborhood_attention
from torch import Tensor

FWD = torch.ops.nearfield.gna_fwd
BWD = torch.ops.nearfield.gna_bwd


def zeros(*shape: int, **kwargs: Any) -> Tensor:
    return torch.zeros(shape, **kwargs)


Q = (1, 6, 7, 4, 8)
ADD = zeros(1, 2, 4, 8)
ERRORS: list[tuple[str, type[Exception], dict[str, Any], list[str]]] = [
    ("rank", ValueError, {"q": zeros(1, 4, 8), "k": zeros(1, 4, 8), "v": zeros(1, 4, 8)}, ["q", "[1, 4, 8]"]),
    ("rank-of-k", ValueError, {"k": zeros(1, 6, 4, 8)}, ["k", "[1, 6, 4, 8]"]),
    ("batch", ValueError, {"k": zeros(2, 6, 7, 4, 8)}, ["k", "[2, 6, 7, 4, 8]"]),
    ("spatial", ValueError, {"v": zeros(1, 6, 8, 4, 8)}, ["v", "[1, 6, 8, 4, 8]"]),
    ("head-dim", ValueError, {"k": zeros(1, 6, 7, 4, 9)}, ["k", "head dim of q, 8"]),
    ("heads-of-v", ValueError, {"v": zeros(1, 6, 7, 2, 8)}, ["v", "heads as k, 4"]),
    ("gqa", ValueError, {"k": zeros(1, 6, 7, 3, 8), "v": zeros(1, 6, 7, 3, 8)}, ["4 heads", "3 heads"]),
    ("more-kv-heads", ValueError, {"k": zeros(1, 6, 7, 8, 8), "v": zeros(1, 6, 7, 8, 8)}, ["8 heads"]),
    ("no-features", ValueError, {"v": zeros(1, 6, 7, 4, 0)}, ["head dims", "0 of v"]),
    ("dtype-of-k", ValueError, {"k": zeros(*Q, dtype=torch.float64)}, ["k", "float64", "float32"]),
    ("device-of-k", ValueError, {"k": zeros(*Q, device="meta")}, ["k", "meta", "cpu"]),
    ("int-dtype", NotImplementedError, {"q": zeros(*Q, dtype=torch.int32)}, ["q", "int32", "bfloat16"]),
    ("sparse", NotImplementedError, {"q": zeros(*Q).to_sparse()}, ["q", "sparse"]),
    ("not-a-tensor", TypeError, {"v": [1.0]}, ["v", "list"]),
    ("window-length", ValueError, {"kernel_size": (3, 3, 3)}, ["kernel_size", "(3, 3, 3)", "2"]),
    ("stride-length", ValueError, {"stride": (1,)}, ["stride", "(1,)", "2"]),
    ("periodic-length", ValueError, {"periodic": (True,)}, ["periodic", "(True,)", "2"]),
    ("periodic-int", TypeError, {"periodic": (True, 1)}, ["periodic", "(True, 1)"]),
    ("periodic-causal", ValueError, {"periodic": True, "is_causal": (False, True)}, ["dimension 1", "periodic", "causal"]),
    ("periodic-dilation", ValueError, {"periodic": True, "dilation": (1, 2)}, ["size 7", "dimension 1", "dilation 2"]),
    ("periodic-per-head", ValueError,
     {"periodic": True, "kernel_size": ((3, 3), (3, 3), (3, 5), (3, 3))}, ["periodic", "kernel_size", "dimension 1"]),
    ("bias-shape", ValueError, {"bias": zeros(4, 5, 4)}, ["bias", "[4, 5, 4]", "[4, 5, 5]"]),
    ("bias-heads", ValueError, {"bias": zeros(2, 5, 5)}, ["bias", "[2, 5, 5]", "[4, 5, 5]"]),
    ("bias-dtype", ValueError, {"bias": zeros(4, 5, 5).half()}, ["bias", "float16", "float32"]),
    ("bias-per-head", ValueError, {"bias": zeros(4, 5, 5), "kernel_size": ((3, 3), (3, 3), (3, 5), (3, 3))},
     ["bias", "kernel_size", "same in all heads"]),
    ("dilation-length", ValueError, {"dilation": [1, 1, 1]}, ["dilation", "[1, 1, 1]", "2"]),
    ("causal-length", ValueError, {"is_causal": (True,)}, ["is_causal", "(True,)", "2"]),
    ("window-0", ValueError, {"kernel_size": 0}, ["kernel_size", "[0, 0]"]),
    ("window--2", ValueError, {"kernel_size": (3, -2)}, ["kernel_size", "[3, -2]"]),
    ("window-too-large", ValueError, {"kernel_size": (3, 8)}, ["kernel_size [3, 8]", "[6, 7]"]),
    ("dilated-too-large", ValueError, {"dilation": (1, 3)}, ["kernel_size [3, 3]", "[1, 3]", "[6, 7]"]),
    ("dilation-leaves-nothing", ValueError, {"kernel_size": -1, "dilation": 8}, ["kernel_size", "[8, 8]"]),
    ("stride-0", ValueError, {"stride": (1, 0)}, ["stride", "[1, 0]"]),
    ("dilation-0", ValueError, {"dilation": 0}, ["dilation", "[0, 0]"]),
    ("stride-above-window", ValueError, {"stride": (1, 4)}, ["stride", "[1, 4]", "kernel_size [3, 3]"]),
    ("window-float", TypeError, {"kernel_size": 3.0}, ["kernel_size", "3.0"]),
    ("window-bool", TypeError, {"kernel_size": True}, ["kernel_size", "True"]),
    ("stride-text", TypeError, {"stride": ("1", 1)}, ["stride", "'1'"]),
    ("causal-int", TypeError, {"is_causal": 1}, ["is_causal", "1"]),
    ("causal-ints", TypeError, {"is_causal": (True, 0)}, ["is_causal", "(True, 0)"]),
    ("scale-text", TypeError, {"scale": "1"}, ["scale", "str"]),
    ("scale-nan", ValueError, {"scale": float("nan")}, ["scale", "nan"]),
    ("keys-without-values", ValueError, {"additional_keys": ADD}, ["additional_keys", "additional_values"]),
    ("values-without-keys", ValueError, {"additional_values": ADD}, ["additional_values", "additional_keys"]),
    ("additional-heads", ValueError, {"additional_keys": zeros(1, 2, 3, 8), "additional_values": ADD},
     ["additional_keys", "[1, 2, 3, 8]", "[1, M, 4, 8]"]),
    ("additional-rank", ValueError, {"additional_keys": zeros(2, 4, 8), "additional_values": ADD},
     ["additional_keys", "[2, 4, 8]"]),
    ("additional-count", ValueError, {"additional_keys": ADD, "additional_values": zeros(1, 3, 4, 8)},
     ["additional_values", "[1, 3, 4, 8]", "2"]),
    ("additional-none", ValueError, dict.fromkeys(["additional_keys", "additional_values"], ADD[:, :0]),
     ["additional_keys", "[1, 0, 4, 8]"]),
    ("additional-dtype", ValueError,
     {"additional_keys": ADD.half(), "additional_values": ADD}, ["additional_keys", "float16"]),
]  # fmt: skip


@pytest.mark.parametrize("kind,change,words", [pytest.param(*e[1:], id=e[0]) for e in ERRORS])
def test_errors_name_the_argument(kind: type[Exception], change: dict[str, Any], words: list[str]) -> None:
    arguments: dict[str, Any] = {"q": zeros(*Q), "k": zeros(*Q), "v": zeros(*Q), "kernel_size": 3} | change
    with pytest.raises(kind, match=r"^neighborhood_attention: ") as error:
        neighborhood_attention(**arguments)
    assert all(word in str(error.value) for word in words), error.value


def test_nested_tensors_are_refused() -> None:
    ragged = torch.nested.nested_tensor([zeros(6, 4, 8), zeros(7, 4, 8)], layout=torch.jagged)
    with pytest.raises(NotImplementedError, match="neighborhood_attention: q is a sparse or nested tensor"):
        neighborhood_attention(ragged, ragged, ragged, 3)


@pytest.mark.parametrize(
    "change,words",
    [
        ({"k": zeros(1, 6, 8, 4, 8)}, ["k", "[1, 6, 8, 4, 8]"]),
        ({"v": zeros(1, 6, 7, 4, 8).half()}, ["v", "dtype"]),
        ({"kernel_size": [3, 8]}, ["kernel_size 8", "size 7"]),
        ({"kernel_size": [2**62, 3]}, ["kernel_size"]),
        ({"kernel_size": [3]}, ["kernel_size"]),
        ({"stride": [4, 1]}, ["stride 4"]),
        ({"dilation": [0, 1]}, ["dilation 0"]),
        ({"bias": zeros(4, 5, 4)}, ["bias", "[4, 5, 4]"]),
        ({"bias": zeros(4, 5, 5).double()}, ["bias", "dtype"]),
        ({"additional_k": zeros(1, 2, 4, 8)}, ["additional_k"]),
        (
            {"additional_k": zeros(1, 2, 4, 8), "additional_v": zeros(1, 3, 4, 8)},
            ["additional_v", "[1, 3, 4, 8]"],
        ),
        ({"q": zeros(1, 6, 7, 3, 8)}, ["3 query heads"]),
        ({"q": zeros(1, 6, 7, 0, 8)}, ["0 query heads"]),
        ({"out": zeros(1, 6, 7, 4, 9)}, ["out", "[1, 6, 7, 4, 9]"]),
        ({"lse": zeros(1, 6, 7, 5)}, ["lse", "[1, 6, 7, 5]"]),
        ({"lse": zeros(1, 6, 7, 4).double()}, ["lse", "dtype"]),
        ({"dlse": zeros(1, 6, 7)}, ["dlse", "[1, 6, 7]"]),
        ({"dout": zeros(1, 6, 7, 4)}, ["dout"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_direct_calls_are_checked_too(change: dict[str, Any], words: list[str]) -> None:
    windows = {"kernel_size": [3, 3], "stride": [1, 1], "dilation": [1, 1], "is_causal": [0, 0], "scale": 1.0}
    arguments: dict[str, Any] = {"q": zeros(*Q), "k": zeros(*Q), "v": zeros(*Q)}
    arguments |= {"additional_k": None, "additional_v": None} | windows
    backward = {"dout": zeros(*Q), "dlse": None, "out": zeros(*Q), "lse": zeros(*Q[:-1])}
    backward["deterministic"] = False
    op, arguments = (BWD, arguments | backward) if change.keys() & backward.keys() else (FWD, arguments)
    with pytest.raises(RuntimeError, match=r"gna_(f|b)wd: ") as error:
        op(**arguments | change)
    assert all(word in str(error.value) for word in words), error.value


def test_backend_is_for_cuda() -> None:
    q = torch.randn(1, 9, 1, 8)
    with pytest.raises(ValueError, match="backend is 'fast', expected one of"):
        neighborhood_attention(q, q, q, 3, backend="fast")
    with pytest.raises(ValueError, match="backend is 'portable', but q is on cpu"):
        neighborhood_attention(q, q, q, 3, backend="portable")
    with pytest.raises(RuntimeError, match='backend is "portable", but the CPU has one implementation'):
        torch.ops.nearfield.gna_fwd(q, q, q, None, None, [3], [1], [1], [0], 1.0, "portable")
