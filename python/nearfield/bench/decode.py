"""Decoding: one new token for every sequence, where reading the memory is all the work there is."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nearfield import delta_rule_step, local_linear_attention_step
from nearfield._accuracy import DELTA_FACTOR, Accuracy, measure
from nearfield.bench.case import OURS, Contender, Group, Pass, Work
from nearfield.bench.delta import Form
from nearfield.delta import delta_rule_reference
from nearfield.lla import reference as lla_reference


@dataclass(frozen=True)
class DeltaStepCase:
    form: Form
    batch: int
    heads: int = 32
    dim: int = 128
    tokens: int = 1
    pool: torch.dtype = torch.float32  # of the states
    v_first: bool = False  # states [V, K] instead of [K, V]
    targets: dict[Pass, float] = field(default_factory=dict)

    @property
    def variant(self) -> str:
        text = f" {self.tokens} tokens" if self.tokens > 1 else ""
        text += f" {str(self.pool).removeprefix('torch.')} states" if self.pool != torch.float32 else ""
        return text + (" V first" if self.v_first else "")

    @property
    def name(self) -> str:
        return f"{self.form} step B{self.batch} H{self.heads}{self.variant}"

    @property
    def kind(self) -> str:
        return f"{self.form} step{self.variant}"

    def facts(self) -> dict[str, float]:
        return {}

    def work(self, dtype: torch.dtype) -> dict[Pass, Work]:
        state = self.batch * self.heads * self.dim**2
        tokens = 4.0 * self.batch * self.tokens * self.heads * self.dim * dtype.itemsize
        # States are read and written once.
        return {"fwd": Work(6.0 * state * self.tokens, 2.0 * state * self.pool.itemsize + tokens)}

    def inputs(self, device: torch.device, dtype: torch.dtype) -> tuple[dict[str, Any], Tensor]:
        shape = (self.batch, self.tokens, self.heads)
        q, k = (F.normalize(torch.randn(*shape, self.dim, device=device), dim=-1).to(dtype) for _ in range(2))
        made = {"q": q, "k": k, "v": torch.randn(*shape, self.dim, device=device, dtype=dtype)}
        made["beta"] = torch.rand(shape, device=device)
        if self.form != "DeltaNet":
            gate = (*shape, self.dim) if self.form == "KDA" else shape
            made["g"] = -0.2 * torch.rand(gate, device=device)
        return made, torch.randn(self.batch, self.heads, self.dim, self.dim, device=device).to(self.pool)

    def contenders(self, device: torch.device, dtype: torch.dtype) -> Iterator[Contender]:
        inputs, state = self.inputs(device, dtype)
        yield Contender(OURS, lambda: delta_rule_step(**inputs, state=state, state_v_first=self.v_first))
        if device.type == "cuda":
            target = torch.empty_like(state)
            yield Contender("copy", lambda: target.copy_(state))
            if importlib.util.find_spec("fla") and self.pool == torch.float32 and not self.v_first:
                peer = _fla(self.form)
                yield Contender(
                    "fla", lambda: peer(**inputs, initial_state=state, output_final_state=True)[0]
                )

    def check(self, device: torch.device, dtype: torch.dtype) -> dict[str, Accuracy]:
        inputs, state = self.inputs(device, dtype)
        pool = state.clone()
        got = delta_rule_step(**inputs, state=pool, state_v_first=self.v_first), pool

        def reference(kind: torch.dtype) -> tuple[Tensor, Tensor | None]:
            given = {name: t.to(kind) for name, t in inputs.items()}
            return delta_rule_reference(
                **given, initial_state=state.to(kind), output_final_state=True, state_v_first=self.v_first
            )

        parts = zip(("out", "state"), got, reference(torch.float64), reference(dtype), strict=True)
        return {
            name: measure(g, t, e.to(g.dtype), DELTA_FACTOR)
            for name, g, t, e in parts
            if t is not None and e is not None
        }


@dataclass(frozen=True)
class LlaStepCase:
    batch: int
    cache: int
    heads: int = 32
    dim: int = 64
    kv_heads: int = 0  # 0: as many as heads
    targets: dict[Pass, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        heads = f"{self.heads}/{self.kv_heads}" if self.kv_heads else str(self.heads)
        return f"LLA step B{self.batch} H{heads} D{self.dim} cache {self.cache}"

    @property
    def kind(self) -> str:
        return "LLA step"

    def facts(self) -> dict[str, float]:
        return {}

    def work(self, dtype: torch.dtype) -> dict[Pass, Work]:
        elements = self.batch * self.cache * self.heads * self.dim
        # Scores and weighted sums, the covariance, its factorisation.
        flops = elements * (6.0 + self.dim) + self.batch * self.heads * self.dim**3 / 3
        kept = elements * (self.kv_heads or self.heads) / self.heads
        return {"fwd": Work(flops, 2.0 * kept * dtype.itemsize)}

    def inputs(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        kv_heads = self.kv_heads or self.heads
        sizes = ((1, self.heads), (self.cache, kv_heads), (self.cache, kv_heads))
        return [torch.randn(self.batch, *size, self.dim, device=device, dtype=dtype) for size in sizes]

    def contenders(self, device: torch.device, dtype: torch.dtype) -> Iterator[Contender]:
        q, k, v = self.inputs(device, dtype)
        lam = torch.tensor(1.0, device=device)  # a number would be copied to the GPU in every call
        yield Contender(OURS, lambda: local_linear_attention_step(q, k, v, lam=lam))
        # Softmax attention over the same cache reads the same bytes.
        qh, kh, vh = (t.transpose(1, 2) for t in (q, k, v))
        grouped = bool(self.kv_heads)
        yield Contender("sdpa", lambda: scaled_dot_product_attention(qh, kh, vh, enable_gqa=grouped))

    def check(self, device: torch.device, dtype: torch.dtype) -> dict[str, Accuracy]:
        q, k, v = dataclasses.replace(self, batch=1).inputs(device, dtype)
        got = local_linear_attention_step(q, k, v, lam=1.0)
        truth, eager = (
            lla_reference.local_linear_attention(q.to(kind), k.to(kind), v.to(kind), lam=1.0)[0]
            for kind in (torch.float64, torch.float32)  # torch.linalg has no 16-bit solver
        )
        return {"out": measure(got, truth, eager.to(dtype))}


def _fla(form: Form) -> Any:
    if form == "DeltaNet":
        from fla.ops.delta_rule import fused_recurrent_delta_rule as peer
    elif form == "GDN":
        from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule as peer
    else:
        from fla.ops.kda import fused_recurrent_kda as peer
    return peer


GROUP = Group(
    "decode",
    "Decoding, one token",
    [
        *(DeltaStepCase("GDN", batch) for batch in (1, 4, 16, 32, 64, 128, 256)),
        DeltaStepCase("DeltaNet", 64),
        DeltaStepCase("KDA", 64),
        *(
            DeltaStepCase("GDN", batch, pool=pool, v_first=v_first)
            for pool, v_first in ((torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True))
            for batch in (16, 128)
        ),
        *(DeltaStepCase("GDN", 32, tokens=tokens, v_first=True) for tokens in (2, 4, 8)),
        *(LlaStepCase(batch, 4096) for batch in (1, 8, 32)),
        LlaStepCase(64, 1024),
        LlaStepCase(1, 32768),
        LlaStepCase(8, 4096, dim=128),
        LlaStepCase(16, 4096, dim=32),
        LlaStepCase(8, 8192, kv_heads=8),
    ],
    [
        DeltaStepCase("GDN", 4, 4, 64),
        DeltaStepCase("KDA", 4, 4, 64),
        DeltaStepCase("GDN", 4, 4, 64, tokens=3, pool=torch.bfloat16, v_first=True),
        LlaStepCase(2, 256, 4, 32),
        LlaStepCase(2, 256, 4, 32, kv_heads=2),
    ],
    ("fwd",),
    rank=4,
)
