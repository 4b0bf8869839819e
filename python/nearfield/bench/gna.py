"""Neighborhood attention beside dense attention of the same shape, and NATTEN where it is installed."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from nearfield import neighborhood_attention
from nearfield._accuracy import Accuracy, measure
from nearfield._explain import explain as explain_call
from nearfield.bench.case import OURS, Contender, Group, Pass, Work
from nearfield.gna import explain
from nearfield.gna.reference import visible_keys

CHECKED_QUERIES = 16
# So few of them send back to a key that the rounding of one exponential does not average out, and that of the kernels'
# own exponential is twice the one of the C library.
FACTOR = 4.0
FP8 = torch.float8_e4m3fn
FP8_DIMS = (64, 128)  # those that Hopper's kernels do not pad


@dataclass(frozen=True)
class GnaCase:
    name: str
    size: tuple[int, ...]
    heads: int
    dim: int
    window: tuple[int, ...]
    stride: tuple[int, ...] = ()
    causal: tuple[bool, ...] = ()
    batch: int = 1
    targets: dict[Pass, float] = field(default_factory=dict)
    backend: str | None = None

    @property
    def kind(self) -> str:
        return "neighborhood attention"

    @property
    def parameters(self) -> dict[str, Any]:
        n = len(self.size)
        return {"stride": self.stride or (1,) * n, "is_causal": self.causal or (False,) * n}

    @property
    def shape(self) -> tuple[int, ...]:
        return self.batch, *self.size, self.heads, self.dim

    def flop_bound(self) -> float:
        """Largest speedup over dense attention: all pairs over the pairs that are needed."""
        bound = 1.0
        for dimension in zip(self.size, self.window, *self.parameters.values(), strict=True):
            bound *= dimension[0] ** 2 / sum(number_seen(x, *dimension) for x in range(dimension[0]))
        return bound

    def facts(self) -> dict[str, float]:
        bounds = {"flop_bound": 1.0 if self._causal_line else self.flop_bound()}
        shares = {f"{name}_full_share": part.full_share for name, part in self._tiles().items()}
        return bounds | {name: share for name, share in shares.items() if share is not None}

    def _tiles(self) -> dict[Pass, explain.Pass]:
        """What the GPU runs, if there is one: a CPU's tiles are as small as its vector registers."""
        if not torch.cuda.is_available():
            return {}
        q = torch.empty(self.shape, device="meta", dtype=torch.bfloat16)
        major, minor = torch.cuda.get_device_capability()
        told = explain_call(
            neighborhood_attention,
            q,
            q,
            q,
            self.window,
            **self.parameters,
            backend=self.backend,
            architecture=f"sm_{major}{minor}",
        )
        assert isinstance(told, explain.NeighborhoodExplanation)
        return {"fwd": told.forward, "bwd": told.backward}

    @property
    def _causal_line(self) -> bool:
        """Dense causal attention, for which the peer is causal too."""
        return self.causal == (True,) and self.window == self.size

    def work(self, dtype: torch.dtype) -> dict[Pass, Work]:
        tokens = math.prod(self.size)
        flops = 4.0 * tokens * tokens * self.dim * self.heads * self.batch / self.flop_bound()
        tensor = float(math.prod(self.shape) * dtype.itemsize)  # q, k, v, out and their gradients
        work: dict[Pass, Work] = {"fwd": Work(flops, 4 * tensor), "bwd": Work(2.5 * flops, 8 * tensor)}
        for name, part in self._tiles().items():
            if part.tile_bound:
                visited = work[name].flops * self.flop_bound() / part.tile_bound
                work[name] = replace(work[name], visited_flops=visited)
        return work

    def contenders(self, device: torch.device, dtype: torch.dtype) -> Iterator[Contender]:
        q, k, v = leaves = [
            torch.randn(self.shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
        ]
        gradient = torch.randn(self.shape, device=device, dtype=dtype)

        def ours() -> Tensor:
            return self._attend(q, k, v)

        yield Contender(OURS, ours, leaves, gradient)
        if self._runs_in_8_bits(device):
            eight = [t.detach().to(FP8) for t in leaves]
            yield Contender("float8", lambda: self._attend(*eight))
        yield from self._dense(leaves, gradient)
        if device.type == "cuda" and importlib.util.find_spec("natten"):
            import natten

            peer = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}[len(self.size)]
            yield Contender("natten", lambda: peer(q, k, v, self.window, **self.parameters), leaves, gradient)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = neighborhood_attention(q, k, v, self.window, **self.parameters, backend=self.backend)
        assert isinstance(out, Tensor)
        return out

    def _runs_in_8_bits(self, device: torch.device) -> bool:
        """Whether the forward of 8-bit inputs has a kernel of its own here."""
        if device.type != "cuda" or self.backend is not None or self.dim not in FP8_DIMS:
            return False
        return torch.cuda.get_device_capability() == (9, 0)

    def _dense(self, leaves: list[Tensor], gradient: Tensor) -> Iterator[Contender]:
        """PyTorch's attention over all pairs: cuDNN's, or FlashAttention-2 where cuDNN refuses the head dim, and beside
        kernels that run on the same instructions.
        """
        q, k, v = tokens = [t.detach().flatten(1, -3).transpose(1, 2).requires_grad_() for t in leaves]

        def attend(backend: SDPBackend) -> Callable[[], Tensor]:
            def call() -> Tensor:
                with sdpa_kernel(backend):
                    return scaled_dot_product_attention(q, k, v, is_causal=self._causal_line)

            return call

        backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
        if self.backend == "portable":
            del backends["cudnn"]
        if gradient.device.type == "cpu":
            backends = {"dense": SDPBackend.FLASH_ATTENTION}
        for name, backend in backends.items():
            same = (q.shape, q.dtype, self._causal_line)
            dense = Contender(name, attend(backend), tokens, gradient.flatten(1, -3).transpose(1, 2), same)
            if self.dim > 128:
                try:
                    torch.autograd.grad(dense.forward(), tokens, dense.gradient)
                except RuntimeError:  # gradients of such head dims are not in every cuDNN
                    continue
            yield dense
            return

    def check(self, device: torch.device, dtype: torch.dtype) -> dict[str, Accuracy]:
        """Some queries of the first batch entry, and what they alone send back to keys and values."""
        q, k, v = (torch.randn(self.shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
        positions = _positions(self.size)
        gradient = torch.zeros(self.shape, device=device, dtype=dtype)
        for at in positions:
            gradient[0][at] = torch.randn(self.heads, self.dim, device=device, dtype=dtype)
        out = self._attend(q, k, v)
        got = (out, *torch.autograd.grad(out, (q, k, v), gradient))
        tensors = [t.detach()[0] for t in (q, k, v, gradient)]
        truth, sizes = self._direct(positions, *(t.double() for t in tensors))
        eager, _ = self._direct(positions, *tensors)
        where = tuple(torch.tensor(x, device=device) for x in zip(*positions, strict=True))
        found = {}
        for name, value in zip(("out", "dq", "dk", "dv"), got, strict=True):
            value = value[0][where] if name in ("out", "dq") else value[0]
            found[name] = measure(value, truth[name], eager[name], FACTOR, scale=sizes.get(name, 0.0))
        if self._runs_in_8_bits(device):
            found["out, float8"] = self._check_8_bits(positions, *(t.detach().to(FP8) for t in (q, k, v)))
        return found

    def _check_8_bits(self, positions: list[tuple[int, ...]], q: Tensor, k: Tensor, v: Tensor) -> Accuracy:
        """Beside plain PyTorch that rounds the weights to 8 bits, 2^8 at their largest, and nothing else."""
        got = self._attend(q, k, v)[0]
        q, k, v = (t[0].double() for t in (q, k, v))
        truth: list[Tensor] = []
        eager: list[Tensor] = []
        for at in positions:
            window = self._window(at, q.device)
            scores = self.dim**-0.5 * torch.einsum("hd,nhd->hn", q[at], k[window].flatten(0, -3))
            p = (scores - scores.amax(-1, keepdim=True)).exp()
            for rows, weights in ((truth, p), (eager, (256 * p).to(FP8).double() / 256)):
                weights = weights / p.sum(-1, keepdim=True)
                rows.append(torch.einsum("hn,nhd->hd", weights, v[window].flatten(0, -3)))
        where = tuple(torch.tensor(x, device=q.device) for x in zip(*positions, strict=True))
        return measure(got[where], torch.stack(truth), torch.stack(eager), FACTOR)

    def _window(self, at: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
        """The keys that a query sees, as indices of the grid's dimensions."""
        keys = [
            torch.tensor(visible_keys(x, length, window, stride, 1, causal), device=device)
            for x, length, window, stride, causal in zip(
                at, self.size, self.window, *self.parameters.values(), strict=True
            )
        ]
        return torch.meshgrid(*keys, indexing="ij")

    def _direct(
        self, positions: list[tuple[int, ...]], q: Tensor, k: Tensor, v: Tensor, gradient: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """From the definition, one query after the other; and how large the terms are that cancel in the gradients."""
        scale = self.dim**-0.5
        rows: dict[str, list[Tensor]] = {"out": [], "dq": []}
        keys_of = {"dk": torch.zeros_like(k), "dv": torch.zeros_like(v)}
        sizes = {"dq": 0.0, "dk": 0.0}
        for at in positions:
            window = self._window(at, q.device)
            q_x, k_y, v_y, d_out = q[at], k[window].flatten(0, -3), v[window].flatten(0, -3), gradient[at]
            scores = scale * torch.einsum("hd,nhd->hn", q_x, k_y)
            # As the kernels do: the sum is kept in float32, the weights are not kept.
            wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
            p = (wide - wide.logsumexp(-1, keepdim=True)).exp().to(scores.dtype)
            out = torch.einsum("hn,nhd->hd", p, v_y)
            d_p, delta = torch.einsum("hd,nhd->hn", d_out, v_y), (d_out * out).sum(-1, keepdim=True)
            d_s = scale * p * (d_p - delta)
            rows["out"].append(out)
            rows["dq"].append(torch.einsum("hn,nhd->hd", d_s, k_y))
            keys_of["dk"][window] += torch.einsum("hn,hd->nhd", d_s, q_x).reshape(k[window].shape)
            keys_of["dv"][window] += torch.einsum("hn,hd->nhd", p, d_out).reshape(k[window].shape)
            # What cancels in dS.
            terms = scale * p * (d_p.abs() + delta.abs())
            sizes["dq"] = max(sizes["dq"], float(torch.einsum("hn,nhd->hd", terms, k_y.abs()).max()))
            sizes["dk"] = max(sizes["dk"], float(torch.einsum("hn,hd->nhd", terms, q_x.abs()).max()))
        return {name: torch.stack(parts) for name, parts in rows.items()} | keys_of, sizes


def number_seen(x: int, length: int, window: int, stride: int, causal: bool) -> int:
    """How many keys query x sees; ``visible_keys`` names them."""
    if not causal:
        return window
    leader = min(x // stride * stride + stride - 1, length - 1)
    return x + 1 - max(leader - window + 1, 0)


def _positions(size: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Both corners, the middle, and the rest spread by a fixed rule."""
    spread = (tuple((7919 * i + 31 * j) % x for j, x in enumerate(size)) for i in range(CHECKED_QUERIES))
    corners = [tuple(0 for _ in size), tuple(x - 1 for x in size), tuple(x // 2 for x in size)]
    return list(dict.fromkeys([*corners, *spread]))


def _targets(fwd: float, bwd: float) -> dict[Pass, float]:
    return {"fwd": fwd, "bwd": bwd}


HUNYUAN, FLUX, COSMOS = (30, 48, 80), (256, 256), (16, 44, 80)
GROUP = Group(
    "gna",
    "Neighborhood attention",
    [
        GnaCase("Hunyuan s1", HUNYUAN, 24, 128, (18, 24, 24), targets=_targets(40, 140)),
        GnaCase("Hunyuan s16,8,8", HUNYUAN, 24, 128, (18, 24, 24), (16, 8, 8), targets=_targets(24.5, 75)),
        GnaCase("FLUX s1", FLUX, 24, 128, (80, 80), targets=_targets(11.5, 36)),
        GnaCase("FLUX s16", FLUX, 24, 128, (80, 80), (16, 16), targets=_targets(8.6, 26)),
        GnaCase("Cosmos s1", COSMOS, 32, 128, (16, 32, 48), targets=_targets(42, 120)),
        GnaCase("Cosmos s1,8,16", COSMOS, 32, 128, (16, 32, 48), (1, 8, 16), targets=_targets(36.5, 112)),
        GnaCase("1-D w1024", (16384,), 16, 128, (1024,), targets=_targets(0.27, 0.80)),
        GnaCase("1-D w1024 causal", (16384,), 16, 128, (1024,), causal=(True,), targets=_targets(0.27, 0.85)),
        GnaCase("1-D w2048", (65536,), 16, 128, (2048,), targets=_targets(1.95, 5.8)),
        GnaCase("NAT D32", (56, 56), 4, 32, (7, 7), batch=64, targets=_targets(0.45, 1.1)),
        GnaCase("NAT D64", (56, 56), 4, 64, (7, 7), batch=64, targets=_targets(0.50, 1.2)),
        GnaCase("Frame-causal", (30, 32, 32), 24, 128, (30, 32, 32), causal=(True, False, False)),
        GnaCase("Dense T8192", (8192,), 16, 128, (8192,)),
        GnaCase("Dense T8192 causal", (8192,), 16, 128, (8192,), causal=(True,)),
        GnaCase("Dense D64", (128, 128), 16, 64, (128, 128)),
        GnaCase("Dense D256", (8192,), 8, 256, (8192,)),
        GnaCase("2-D D256", (128, 128), 8, 256, (32, 32)),
    ],
    [
        GnaCase("Hunyuan s1, small", (6, 12, 16), 2, 64, (4, 6, 6)),
        GnaCase("Hunyuan s4,2,2, small", (6, 12, 16), 2, 64, (4, 6, 6), (4, 2, 2)),
        GnaCase("FLUX s1, small", (40, 40), 2, 64, (13, 13)),
        GnaCase("1-D w256, small", (2048,), 2, 64, (256,)),
        GnaCase("1-D w256 causal, small", (2048,), 2, 64, (256,), causal=(True,)),
        GnaCase("NAT D32, small", (28, 28), 2, 32, (7, 7), batch=2),
        GnaCase("Frame-causal, small", (6, 12, 12), 2, 64, (6, 12, 12), causal=(True, False, False)),
    ],
    ("fwd", "bwd"),
    rank=1,
)
