"""Local linear attention with a fixed number of solver steps, and its readout alone, beside causal softmax attention of the
same shape; and the same over neighborhoods of a grid."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nearfield import local_linear_attention, neighborhood_local_linear_attention, probe_attention
from nearfield._accuracy import Accuracy, measure
from nearfield.bench import blockwise
from nearfield.bench.case import OURS, Contender, Group, Pass, Work
from nearfield.bench.gna import number_seen
from nearfield.lla import reference

STEPS = 8  # of the solver
PRODUCTS = 3 * STEPS + 5  # scores, mean key, readout: 5; 3 a step
TIMED: dict[str, Any] = {"tol": 0.0, "max_iters": STEPS}
CHECKED: dict[str, Any] = {"tol": 1e-7, "max_iters": 300}  # solved to the end
CHECKED_ROWS = 32  # the last ones, which see every key


def _results(out: Tensor, leaves: dict[str, Tensor], upstream: Tensor) -> dict[str, Tensor]:
    grads = torch.autograd.grad(out, list(leaves.values()), upstream.to(out))
    return {"out": out} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


@dataclass(frozen=True)
class LlaCase:
    length: int
    heads: int
    dim: int
    batch: int = 1
    window: int | None = None
    targets: dict[Pass, float] = field(default_factory=dict)
    backend: str | None = None
    arguments: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    timed: ClassVar[dict[str, Any]] = TIMED
    checked: ClassVar[dict[str, Any]] = CHECKED

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
        return self._work(PRODUCTS, 4, dtype)

    def _work(self, products: int, tensors: int, dtype: torch.dtype) -> dict[Pass, Work]:
        w = min(self.window or self.length, self.length)
        pairs = self.length * w - w * (w - 1) / 2
        row = float(self.heads * self.dim * self.batch)
        return {"fwd": Work(2 * products * pairs * row, tensors * self.length * row * dtype.itemsize)}

    def inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        shape = (self.batch, self.length, self.heads, self.dim)
        return {
            name: torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
            for name in self.arguments
        }

    def call(self, inputs: dict[str, Tensor], **solver: Any) -> Tensor:
        q, k, v = inputs.values()
        out: Tensor = local_linear_attention(q, k, v, window=self.window, backend=self.backend, **solver)
        return out

    def reference(self, inputs: dict[str, Tensor]) -> Tensor:
        q, k, v = inputs.values()
        return reference.local_linear_attention(q, k, v, lam=1.0, window=self.window)[0]

    def contenders(self, device: torch.device, dtype: torch.dtype) -> Iterator[Contender]:
        inputs = self.inputs(device, dtype)
        leaves, gradient = list(inputs.values()), torch.randn_like(inputs["v"])
        lam = torch.tensor(1.0, device=device)  # a number would be copied to the GPU in every call
        yield Contender(OURS, lambda: self.call(inputs, lam=lam, **self.timed), leaves, gradient)
        if self.backend == "portable" and device.type == "cuda":
            yield Contender(
                "compiled", lambda: blockwise.call(inputs["q"], inputs["k"], inputs["v"], lam, STEPS)
            )
        elif self.window is None:
            dense = [inputs[name].detach().transpose(1, 2).requires_grad_() for name in ("q", "k", "v")]
            yield Contender(
                "sdpa",
                lambda: scaled_dot_product_attention(dense[0], dense[1], dense[2], is_causal=True),
                dense,
                gradient.transpose(1, 2),
            )

    def check(self, device: torch.device, dtype: torch.dtype) -> dict[str, Accuracy]:
        """The last queries, solved to the end, and what they alone send back."""
        inputs = self.inputs(device, dtype)
        last = slice(-min(CHECKED_ROWS, self.length), None)
        upstream = torch.zeros_like(inputs["v"])
        upstream[:, last] = torch.randn_like(upstream[:, last])

        got = _results(self.call(inputs, lam=1.0, **self.checked), inputs, upstream)
        of_queries = [name for name in ("out", "dq", "dx") if name in got]
        got |= {name: got[name][:, last] for name in of_queries}

        def direct(kind: torch.dtype) -> dict[str, Tensor]:
            leaves = {
                name: (t[:, last] if name in ("q", "x") else t).detach().to(kind).requires_grad_()
                for name, t in inputs.items()
            }
            return _results(self.reference(leaves), leaves, upstream[:, last])

        # torch.linalg has no 16-bit solver.
        truth, eager = direct(torch.float64), direct(torch.float32)
        return {name: measure(got[name], truth[name], eager[name].to(dtype)) for name in got}


@dataclass(frozen=True)
class ReadoutCase(LlaCase):
    """The slope is an input and nothing is solved."""

    arguments: ClassVar[tuple[str, ...]] = ("q", "x", "k", "v")
    timed: ClassVar[dict[str, Any]] = {}
    checked: ClassVar[dict[str, Any]] = {}

    @property
    def name(self) -> str:
        return f"readout B{self.batch} T{self.length} H{self.heads} D{self.dim}"

    @property
    def kind(self) -> str:
        return "readout"

    def facts(self) -> dict[str, float]:
        return {}

    def work(self, dtype: torch.dtype) -> dict[Pass, Work]:
        return self._work(3, 5, dtype)

    def call(self, inputs: dict[str, Tensor], **_: Any) -> Tensor:
        q, x, k, v = inputs.values()
        return probe_attention(q, x, k, v, window=self.window)

    def contenders(self, device: torch.device, dtype: torch.dtype) -> Iterator[Contender]:
        yield from super().contenders(device, dtype)
        if device.type == "cuda" and importlib.util.find_spec("fla"):
            from fla.ops.parallax import parallel_parallax

            q, r, k, v = leaves = list(self.inputs(device, dtype).values())
            yield Contender("fla", lambda: parallel_parallax(q, r, k, v), leaves, torch.randn_like(v))

    def reference(self, inputs: dict[str, Tensor]) -> Tensor:
        q, x, k, v = inputs.values()
        return reference.probe_attention(q, x, k, v, window=self.window)


@dataclass(frozen=True)
class GridCase:
    """Neighborhoods of a grid. Checked are the last queries, those that see the whole last window: for them the
    operator is the dense one on that window's tokens."""

    size: tuple[int, ...]
    window: tuple[int, ...]
    heads: int
    dim: int
    causal: tuple[bool, ...]
    targets: dict[Pass, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        def by(numbers: tuple[int, ...]) -> str:
            return "x".join(map(str, numbers))

        causal = " c" + by(tuple(map(int, self.causal))) if any(self.causal) else ""
        return f"grid {by(self.size)} w{by(self.window)}{causal} H{self.heads} D{self.dim} I{STEPS}"

    @property
    def kind(self) -> str:
        return "local linear attention on a grid"

    def facts(self) -> dict[str, float]:
        return {"solver_steps": STEPS}

    def work(self, dtype: torch.dtype) -> dict[Pass, Work]:
        axes = zip(self.size, self.window, self.causal, strict=True)
        pairs = math.prod(sum(number_seen(x, n, w, 1, causal) for x in range(n)) for n, w, causal in axes)
        row = float(self.heads * self.dim)
        tokens = math.prod(self.size)
        return {"fwd": Work(2 * PRODUCTS * pairs * row, 4 * tokens * row * dtype.itemsize)}

    def inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        shape = (1, *self.size, self.heads, self.dim)
        return {
            name: torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
            for name in ("q", "k", "v")
        }

    def call(self, inputs: dict[str, Tensor], **solver: Any) -> Tensor:
        q, k, v = inputs.values()
        out: Tensor = neighborhood_local_linear_attention(
            q, k, v, self.window, is_causal=self.causal, **solver
        )
        return out

    def contenders(self, device: torch.device, dtype: torch.dtype) -> Iterator[Contender]:
        inputs = self.inputs(device, dtype)
        lam = torch.tensor(1.0, device=device)
        gradient = torch.randn_like(inputs["v"])
        yield Contender(OURS, lambda: self.call(inputs, lam=lam, **TIMED), list(inputs.values()), gradient)

    def check(self, device: torch.device, dtype: torch.dtype) -> dict[str, Accuracy]:
        inputs = self.inputs(device, dtype)
        seen = (slice(None), *(slice(-w, None) for w in self.window))
        pairs = zip(self.window, self.causal, strict=True)
        queries = (slice(None), *(slice(-1 if causal else -(w // 2) - 1, None) for w, causal in pairs))
        upstream = torch.zeros_like(inputs["v"])
        upstream[queries] = torch.randn_like(upstream[queries])
        places = {"out": queries, "dq": queries, "dk": seen, "dv": seen}
        got = {
            name: t[places[name]].flatten(1, -3)
            for name, t in _results(self.call(inputs, lam=1.0, **CHECKED), inputs, upstream).items()
        }

        def direct(kind: torch.dtype) -> dict[str, Tensor]:
            leaves = {
                name: t[places[f"d{name}"]].flatten(1, -3).detach().to(kind).requires_grad_()
                for name, t in inputs.items()
            }
            q, k, v = leaves.values()
            out = reference.local_linear_attention(q, k, v, lam=1.0, is_causal=False)[0]
            return _results(out, leaves, upstream[queries].flatten(1, -3))

        truth, eager = direct(torch.float64), direct(torch.float32)
        return {name: measure(got[name], truth[name], eager[name].to(dtype)) for name in got}


def _targets(fwd: float, bwd: float = 0.0) -> dict[Pass, float]:
    return {"fwd": fwd, "bwd": bwd or 1.5 * fwd}


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
        *(LlaCase(length, 8, 64, window=512) for length in (4096, 65536, 262144)),
        ReadoutCase(4096, 8, 64, targets=_targets(0.152, 0.622)),
        ReadoutCase(4096, 8, 128, targets=_targets(0.342, 1.378)),
        *(
            GridCase((128, 128), (w, w), 8, dim, (False, False))
            for dim, w in itertools.product((64, 128), (7, 13, 31))
        ),
        *(GridCase((16, 32, 32), (5, 7, 7), 8, dim, (True, False, False)) for dim in (64, 128)),
    ],
    [
        LlaCase(256, 4, 32),
        LlaCase(256, 4, 64),
        LlaCase(1024, 2, 32, window=128),
        ReadoutCase(256, 4, 32),
        GridCase((24, 20), (7, 5), 2, 32, (True, False)),
    ],
    ("fwd", "bwd"),
    rank=3,
)
