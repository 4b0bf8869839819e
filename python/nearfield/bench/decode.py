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

from nearfield import delta_rule_step, local_linear_attention_step
from nearfield._accuracy import Accuracy, measure
from nearfield.bench.case import OURS, Contender, Group, Pass, Work
from nearfield.bench.delta import FACTOR, Form
from nearfield.delta import delta_rule_reference
from nearfield.lla import reference as lla_reference


@dataclass(frozen=True)
class DeltaStepCase:
    form: Form
    batch: int
    heads: int = 32
    dim: int = 128
    targets: dict[Pass, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.form} step B{self.batch} H{self.heads}"

    @property
    def kind(self) -> str:
        return f"{self.form} step"

    def facts(self) -> dict[str, float]:
        return {}

    def work(self, dtype: torch.dtype) -> dict[Pass, Work]:
        state = self.batch * self.heads * self.dim**2
        return {"fwd": Work(6.0 * state, 8.0 * state)}  # float32, read and written

    def inputs(self, device: torch.device, dtype: torch.dtype) -> tuple[dict[str, Any], Tensor]:
        shape = (self.batch, 1, self.heads)
        q, k = (F.normalize(torch.randn(*shape, self.dim, device=device), dim=-1).to(dtype) for _ in range(2))
        made = {"q": q, "k": k, "v": torch.randn(*shape, self.dim, device=device, dtype=dtype)}
        made["beta"] = torch.rand(shape, device=device, dtype=dtype)
        if self.form != "DeltaNet":
            gate = (*shape, self.dim) if self.form == "KDA" else shape
            made["g"] = -0.2 * torch.rand(gate, device=device, dtype=dtype)
        return made, torch.randn(self.batch, self.heads, self.dim, self.dim, device=device)

    def contenders(self, device: torch.device, dtype: torch.dtype) -> Iterator[Contender]:
        inputs, state = self.inputs(device, dtype)
        yield Contender(OURS, lambda: delta_rule_step(**inputs, state=state))
        if device.type == "cuda" and importlib.util.find_spec("fla"):
            peer = _fla(self.form)
            yield Contender("fla", lambda: peer(**inputs, initial_state=state, output_final_state=True)[0])

    def check(self, device: torch.device, dtype: torch.dtype) -> dict[str, Accuracy]:
        inputs, state = self.inputs(device, dtype)
        pool = state.clone()
        got = delta_rule_step(**inputs, state=pool), pool
        wide = {name: t.double() for name, t in inputs.items()}
        truth = delta_rule_reference(**wide, initial_state=state.double(), output_final_state=True)
        eager = delta_rule_reference(**inputs, initial_state=state.to(dtype), output_final_state=True)
        parts = zip(("out", "state"), got, truth, eager, strict=True)
        return {
            name: measure(g, t, e.to(g.dtype), FACTOR)
            for name, g, t, e in parts
            if t is not None and e is not None
        }


@dataclass(frozen=True)
class LlaStepCase:
    batch: int
    cache: int
    heads: int = 32
    dim: int = 64
    targets: dict[Pass, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"LLA step B{self.batch} H{self.heads} cache {self.cache}"

    @property
    def kind(self) -> str:
        return "LLA step"

    def facts(self) -> dict[str, float]:
        return {}

    def work(self, dtype: torch.dtype) -> dict[Pass, Work]:
        elements = self.batch * self.cache * self.heads * self.dim
        # Scores and weighted sums, the covariance, its factorisation.
        flops = elements * (6.0 + self.dim) + self.batch * self.heads * self.dim**3 / 3
        return {"fwd": Work(flops, 2.0 * elements * dtype.itemsize)}

    def inputs(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        sizes = (1, self.cache, self.cache)
        return [torch.randn(self.batch, n, self.heads, self.dim, device=device, dtype=dtype) for n in sizes]

    def contenders(self, device: torch.device, dtype: torch.dtype) -> Iterator[Contender]:
        q, k, v = self.inputs(device, dtype)
        yield Contender(OURS, lambda: local_linear_attention_step(q, k, v, lam=1.0))

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
        *(DeltaStepCase("GDN", batch) for batch in (1, 16, 64, 256)),
        DeltaStepCase("DeltaNet", 64),
        DeltaStepCase("KDA", 64),
        LlaStepCase(16, 4096),
    ],
    [DeltaStepCase("GDN", 4, 4, 64), DeltaStepCase("KDA", 4, 4, 64), LlaStepCase(2, 256, 4, 32)],
    ("fwd",),
    rank=4,
)
