"""The forward of 8-bit inputs: what it refuses, its fake kernel, and that it has no gradient."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from nearfield import _runtime

DTYPE = torch.float8_e4m3fn
OUT_DTYPES = (torch.bfloat16, torch.float16)


def check_absent(op: str, q: Tensor, **arguments: object) -> None:
    """Raises where an argument of 8-bit inputs is given with others."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{op}: {name} is given, but q has dtype {q.dtype}; expected {DTYPE} with it")


def forward(
    op: str, q: Tensor, k: Tensor, v: Tensor, windows: tuple[list[int], ...], scale: float,
    descales: dict[str, Tensor | None], out_dtype: torch.dtype | None, **refused: object,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``(out, lse)`` of checked shapes and windows; ``refused`` are arguments that 8-bit inputs do not take."""
    for name, value in refused.items():
        if value is not None and value is not False:
            raise NotImplementedError(
                f"{op}: {name} is given with {DTYPE}; supported with it: bfloat16, float16, float32"
            )
    if torch.is_grad_enabled():
        for name, t in {"q": q, "k": k, "v": v, **descales}.items():
            if t is not None and t.requires_grad:
                raise NotImplementedError(
                    f"{op}: {name} requires a gradient, but {DTYPE} has a forward only; supported: "
                    "torch.no_grad(), or bfloat16, float16, float32"
                )
    if scale <= 0:
        raise NotImplementedError(f"{op}: scale is {scale} with {DTYPE}; supported: positive numbers")
    out_dtype = torch.bfloat16 if out_dtype is None else out_dtype
    if out_dtype not in OUT_DTYPES:
        raise NotImplementedError(
            f"{op}: out_dtype is {out_dtype}; supported: " + ", ".join(str(d) for d in OUT_DTYPES)
        )
    for name, t in descales.items():
        if t is None:
            continue
        if t.dtype != torch.float32:
            raise ValueError(f"{op}: {name} has dtype {t.dtype}, expected torch.float32")
        if tuple(t.shape) != (want := (k.shape[0], k.shape[-2])):
            _runtime.shape_error(op, name, t, f"{list(want)}: batch, heads of k and v")
    out, lse = _attend(q, k, v, *descales.values(), *windows, scale, out_dtype)
    return out, lse


def _fake(
    q: Tensor, k: Tensor, v: Tensor, q_descale: Tensor | None, k_descale: Tensor | None, v_descale: Tensor | None,
    kernel_size: list[int], stride: list[int], dilation: list[int], is_causal: list[int], scale: float, out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=out_dtype)
    return out, q.new_empty(q.shape[:-1], dtype=torch.float32)


def _no_derivative(ctx: Any, *grads: Tensor | None) -> NoReturn:
    raise NotImplementedError(f"gna_fwd_8bit: {DTYPE} has a forward only; supported: bfloat16, float16")


torch.library.register_fake("nearfield::gna_fwd_8bit", _fake)
_attend = _runtime.differentiable("gna_fwd_8bit", _no_derivative)
