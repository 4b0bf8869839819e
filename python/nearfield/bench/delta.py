"""The delta rule over whole sequences, beside flash-linear-attention where it is installed."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfield import delta_rule
from nearfield._accuracy import DELTA_FACTOR, Accuracy, measure
from nearfield.bench.case import OURS, Contender, Group, Pass, Work
from nearfield.delta import delta_rule_reference

Form = Literal["DeltaNet", "GDN", "KDA"]
CHECKED_GRADIENTS = 100  # tokens; the reference keeps a state of every token for its backward


@dataclass(frozen=True)
class DeltaCase:
    form: Form
    batch: int
    heads: int
    length: int
    dim: int = 128  # of keys and values
    decay: float = 0.1  # mean of -g; 0: nothing is forgotten
    targets: dict[Pass, float] = field(default_factory=dict)
    backend: str | None = None

    @property
    def name(self) -> str:
        remark = " g=0" if self.form != "DeltaNet" and self.decay == 0 else ""
        return f"{self.form} B{self.batch} H{self.heads} T{self.length}{remark}"

    @property
    def kind(self) -> str:
        return self.form

    def facts(self) -> dict[str, float]:
        return {}

    def inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        shape = (self.batch, self.length, self.heads)
        q, k = (F.normalize(torch.randn(*shape, self.dim, device=device), dim=-1).to(dtype) for _ in range(2))
        made = {"q": q, "k": k, "v": torch.randn(*shape, self.dim, device=device, dtype=dtype)}
        made["beta"] = torch.rand(shape, device=device)  # gates in float32, as long sequences want them
        if self.form != "DeltaNet":
            gate = (*shape, self.dim) if self.form == "KDA" else shape
            made["g"] = -2 * self.decay * torch.rand(gate, device=device)
        return {name: t.requires_grad_() for name, t in made.items()}

    def work(self, dtype: torch.dtype) -> dict[Pass, Work]:
        tokens = self.batch * self.length * self.heads
        gates = {"DeltaNet": 1, "GDN": 2, "KDA": 1 + self.dim}[self.form]  # beta and g
        flops = 6.0 * tokens * self.dim**2  # read, correct, read again
        reads = float(tokens * (3 * self.dim * dtype.itemsize + 4 * gates))
        out = float(tokens * self.dim * dtype.itemsize)
        return {"fwd": Work(flops, reads + out), "fwdbwd": Work(3 * flops, 3 * reads + 2 * out)}

    def _ours(self, **inputs: Any) -> Any:
        return delta_rule(**inputs, backend=self.backend)

    def contenders(self, device: torch.device, dtype: torch.dtype) -> Iterator[Contender]:
        inputs = self.inputs(device, dtype)
        leaves, gradient = list(inputs.values()), torch.randn_like(inputs["v"])
        yield Contender(OURS, lambda: self._ours(**inputs)[0], leaves, gradient)
        if device.type == "cuda" and importlib.util.find_spec("fla"):
            peer = _fla(self.form)
            given = dict(inputs)
            if self.form == "DeltaNet":  # which takes beta in the type of the queries
                given["beta"] = inputs["beta"].detach().to(dtype).requires_grad_()
            yield Contender("fla", lambda: peer(**given)[0], list(given.values()), gradient)

    def check(self, device: torch.device, dtype: torch.dtype) -> dict[str, Accuracy]:
        inputs = {name: t.detach() for name, t in self.inputs(device, dtype).items()}
        out = self._ours(**inputs)[0]
        truth = delta_rule_reference(**_cast(inputs, torch.float64))[0]
        eager = delta_rule_reference(**_cast(inputs, dtype))[0]
        found = {"out": measure(out, truth, eager.to(dtype), DELTA_FACTOR)}
        return found | dataclasses.replace(self, length=min(self.length, CHECKED_GRADIENTS))._gradients(
            device, dtype
        )

    def _gradients(self, device: torch.device, dtype: torch.dtype) -> dict[str, Accuracy]:
        inputs = {name: t.detach() for name, t in self.inputs(device, dtype).items()}
        upstream = torch.randn_like(inputs["v"])

        def gradients(function: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
            out = function(**leaves)[0]
            found = torch.autograd.grad(out, list(leaves.values()), upstream.to(out))
            return dict(zip(leaves, found, strict=True))

        got = gradients(self._ours, inputs)
        truth, eager = (
            gradients(delta_rule_reference, _cast(inputs, kind)) for kind in (torch.float64, dtype)
        )
        return {
            f"d{name}": measure(got[name], truth[name], eager[name].to(got[name].dtype), DELTA_FACTOR)
            for name in got
        }


def _cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
    return {name: t.detach().to(dtype) for name, t in inputs.items()}


def _fla(form: Form) -> Any:
    if form == "DeltaNet":
        from fla.ops.delta_rule import chunk_delta_rule as peer
    elif form == "GDN":
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule as peer
    else:
        from fla.ops.kda import chunk_kda as peer
    return peer


def _targets(fwd: float, fwdbwd: float) -> dict[Pass, float]:
    return {"fwd": fwd, "fwdbwd": fwdbwd}


GROUP = Group(
    "delta",
    "Delta rule",
    [
        DeltaCase("DeltaNet", 1, 16, 8192, targets=_targets(0.17, 0.75)),
        DeltaCase("DeltaNet", 1, 32, 32768, targets=_targets(0.62, 2.4)),
        DeltaCase("DeltaNet", 4, 16, 4096, targets=_targets(0.18, 0.75)),
        DeltaCase("GDN", 1, 16, 8192, targets=_targets(0.17, 0.75)),
        DeltaCase("GDN", 1, 16, 8192, decay=0.0, targets=_targets(0.17, 0.75)),
        DeltaCase("GDN", 1, 32, 32768, targets=_targets(0.62, 2.4)),
        DeltaCase("GDN", 1, 32, 32768, decay=0.0, targets=_targets(0.62, 2.4)),
        DeltaCase("GDN", 4, 16, 4096, targets=_targets(0.18, 0.75)),
        DeltaCase("GDN", 8, 16, 8192),
        DeltaCase("GDN", 1, 4, 65536),
        DeltaCase("KDA", 1, 16, 8192, targets=_targets(0.30, 1.5)),
        DeltaCase("KDA", 4, 16, 4096, targets=_targets(0.35, 1.5)),
    ],
    [
        DeltaCase("DeltaNet", 1, 2, 200, 64),
        DeltaCase("GDN", 1, 2, 200, 64),
        DeltaCase("KDA", 1, 2, 200, 64),
    ],
    ("fwd", "fwdbwd"),
    rank=2,
)
