"""Problems of 8-bit inputs, what they stand for in float64, and the yardstick: plain PyTorch with an 8-bit P."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from compare import assert_accurate
from gna_cases import Case
from nearfield import neighborhood_attention
from nearfield.gna.reference import neighborhood_mask
from torch import Tensor

FP8 = torch.float8_e4m3fn
# Of torch's checks the first compares inputs by arithmetic that it does not have for this type.
CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
NAMES = ("q_descale", "k_descale", "v_descale")


@dataclass
class Inputs:
    """Quantized q, k and v; what q, k and v are multiplied by, [B, Hkv]."""

    tensors: list[Tensor]
    descales: list[Tensor] | None

    @property
    def named(self) -> dict[str, Tensor]:
        return dict(zip(NAMES, self.descales or [], strict=False))

    def wide(self) -> list[Tensor]:
        """What the inputs stand for."""
        q, k, v = (t.double() for t in self.tensors)
        if self.descales is not None:
            shared = q.shape[-2] // k.shape[-2]
            of_q, of_k, of_v = (
                d.double().reshape(d.shape[0], *[1] * (q.dim() - 3), d.shape[1], 1) for d in self.descales
            )
            q, k, v = q * of_q.repeat_interleave(shared, -2), k * of_k, v * of_v
        return [q, k, v]


def inputs(case: Case, device: str, *, scaled: bool = True) -> Inputs:
    """Normal numbers, quantized so that the largest of a batch entry and head of k is 448; or as they are."""
    tensors = [t.detach().float() for t in case.inputs(torch.float64)]
    if not scaled:
        return Inputs([t.to(FP8).to(device) for t in tensors], None)
    quantized, descales = [], []
    for t in tensors:
        grouped = t.reshape(case.batch, -1, case.heads_kv, t.shape[-2] // case.heads_kv, t.shape[-1])
        grouped = grouped * torch.rand(case.batch, 1, case.heads_kv, 1, 1).add(0.5)
        largest = grouped.abs().amax((1, 3, 4)).clamp(min=1e-6) / 448
        quantized.append(
            (grouped / largest[:, None, :, None, None]).clamp(-448, 448).to(FP8).reshape(t.shape)
        )
        descales.append(largest)
    return Inputs([t.to(device) for t in quantized], [d.to(device) for d in descales])


def run(case: Case, given: Inputs, **options: Any) -> tuple[Tensor, Tensor]:
    out = neighborhood_attention(
        *given.tensors, case.window, stride=case.stride, dilation=case.dilation, is_causal=case.causal,
        scale=case.scale, return_lse=True, **given.named, **options,
    )  # fmt: skip
    assert isinstance(out, tuple)
    return out


def eager(case: Case, wide: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Plain attention of the same dtype: P is rounded to 8 bits, 2^8 at its largest, and scores are summed in 14 bits.

    That is what Hopper's tensor cores keep of the sums of an 8-bit product, cut off and not rounded: lse is off by as
    much of the terms of its largest score.
    """
    size, q_shape = wide[0].shape[1:-2], wide[0].shape[:-1]
    mask = neighborhood_mask(size, *case.windows).to(wide[0].device)
    q, k, v = (t.flatten(1, -3) for t in wide)
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))

    def scores(q: Tensor, k: Tensor, hidden: float) -> Tensor:
        return (case.used_scale * torch.einsum("bxhd,byhd->bhxy", q, k)).masked_fill(~mask, hidden)

    z = scores(q, k, float("-inf"))
    numerators = (z - z.amax(-1, keepdim=True)).exp()
    rounded = (numerators * 256).to(FP8).double() / 256
    out = torch.einsum("bhxy,byhe->bxhe", rounded / numerators.sum(-1, keepdim=True), v)
    lse = z.logsumexp(-1) + 2.0**-14 * scores(q.abs(), k.abs(), 0.0).amax(-1)
    return out.to(dtype).reshape(*q_shape, v.shape[-1]), lse.transpose(1, 2).reshape(q_shape)


def check(case: Case, given: Inputs, **options: Any) -> None:
    """out and lse against the definition in float64; on the CPU, which rounds no P, with the error of float32."""
    out, lse = run(case, given, **options)
    dtype = options.get("out_dtype", torch.bfloat16)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    wide = given.wide()
    truth = case.reference(wide)
    if out.is_cuda:
        plain, factor = eager(case, wide, dtype), 2.0
    else:
        plain, factor = case.reference([t.float() for t in wide]), 8.0
    assert_accurate(f"out of {case}", out, truth[0], plain[0].to(dtype))
    assert_accurate(f"lse of {case}", lse, truth[1], plain[1], factor=factor, scale=8.0)
