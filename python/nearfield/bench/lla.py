"""Local linear attention with a fixed number of solver steps, beside causal softmax attention of the same shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nearfield import local_linear_attention
from nearfield._accuracy import Accuracy, measure
from nearfield.bench.case import OURS, Contender, Group, Pass, Work
from nearfield.lla import reference

STEPS = 8  # of the solver
CHECKED_ROWS = 32  # the last ones, which see every key


@dataclass(frozen=True)
class LlaCase:
    length: int
    heads: int
    dim: int
    batch: int = 1
    window: int | None = None
    targets: dict[Pass, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        window = f" w{self.window}" if self.window else ""
        return f"B{self.batch} T{self.length} H{self.heads} D{self.dim}{window} I{STEPS}"

    @property
    def kind(self) -> str:
        return "local linear attention"

    def facts(self) -> dict[str, float]:
        return {"solver_steps": STEPS}

    def work(self, dtype: torch.dtype) -> dict[Pass, Work]:
        w = min(self.window or self.length, self.length)
        pairs = self.length * w - w * (w - 1) / 2
        # Scores, mean key, readout: 5 products; 3 a step.
        flops = (3 * STEPS + 5) * 2.0 * pairs * self.dim * self.heads * self.batch
        return {"fwd": Work(flops, 4.0 * self.batch * self.length * self.heads * self.dim * dtype.itemsize)}

    def inputs(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        shape = (self.batch, self.length, self.heads, self.dim)
        return [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]

    def contenders(self, device: torch.device, dtype: torch.dtype) -> Iterator[Contender]:
        q, k, v = leaves = self.inputs(device, dtype)
        gradient = torch.randn_like(v)
        options: dict[str, Any] = {"lam": 1.0, "tol": 0.0, "max_iters": STEPS, "window": self.window}
        yield Contender(OURS, lambda: local_linear_attention(q, k, v, **options), leaves, gradient)
        if self.window is None:
            dense = [t.detach().transpose(1, 2).requires_grad_() for t in leaves]
            yield Contender(
                "sdpa",
                lambda: scaled_dot_product_attention(dense[0], dense[1], dense[2], is_causal=True),
                dense,
                gradient.transpose(1, 2),
            )

    def check(self, device: torch.device, dtype: torch.dtype) -> dict[str, Accuracy]:
        """The last queries, solved to the end, and what they alone send back."""
        q, k, v = self.inputs(device, dtype)
        rows = min(CHECKED_ROWS, self.length)
        upstream = torch.zeros_like(v)
        upstream[:, -rows:] = torch.randn_like(upstream[:, -rows:])
        out = local_linear_attention(q, k, v, lam=1.0, tol=1e-7, max_iters=300, window=self.window)
        grads = torch.autograd.grad(out, (q, k, v), upstream)
        got = {"out": out[:, -rows:], "dq": grads[0][:, -rows:], "dk": grads[1], "dv": grads[2]}

        def direct(kind: torch.dtype) -> dict[str, Tensor]:
            leaves = [t.detach().to(kind).requires_grad_() for t in (q[:, -rows:], k, v)]
            out = reference.local_linear_attention(*leaves, lam=1.0, window=self.window)[0]
            grads = torch.autograd.grad(out, leaves, upstream[:, -rows:].to(kind))
            return dict(zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True))

        # torch.linalg has no 16-bit solver.
        truth, eager = direct(torch.float64), direct(torch.float32)
        return {name: measure(got[name], truth[name], eager[name].to(dtype)) for name in got}


def _targets(fwd: float) -> dict[Pass, float]:
    return {"fwd": fwd, "bwd": 1.5 * fwd}


GROUP = Group(
    "lla",
    "Local linear attention",
    [
        LlaCase(2048, 8, 64, targets=_targets(0.25)),
        LlaCase(4096, 8, 64, targets=_targets(0.65)),
        LlaCase(2048, 8, 128, targets=_targets(0.45)),
        LlaCase(4096, 8, 128, targets=_targets(1.25)),
        LlaCase(4096, 32, 64, targets=_targets(2.3)),
        LlaCase(4096, 32, 128, targets=_targets(5.0)),
        LlaCase(4096, 8, 64, window=512),
        LlaCase(65536, 8, 64, window=512),
    ],
    [LlaCase(256, 4, 32), LlaCase(256, 4, 64), LlaCase(1024, 2, 32, window=128)],
    ("fwd", "bwd"),
    rank=3,
)
