"""What a call of neighborhood attention runs. The facts come from the operator ``gna_plan``, which is the plan that
the kernels' dispatch carries out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from nearfield import _explain, _runtime
from nearfield.gna import op


@dataclass(frozen=True)
class Step:
    """One kernel of a pass. Counts are per batch entry and query head."""

    kernel: str
    launches: int
    """Kernel launches; on the CPU 0."""
    heads: int
    """Query heads of this step: those with the same windows."""
    head_dim: int | None = None
    """The compiled one; smaller head dims are padded with zeros by the copy engine."""
    q_tile: tuple[int, ...] | None = None
    """Sides of the box of queries, outermost first."""
    kv_tile: tuple[int, ...] | None = None
    visited: int = 0
    """Pairs of a query tile and a key tile that are multiplied."""
    full: int = 0
    """Those that need no mask."""
    additional: bool = False
    """The staying keys are the additional tokens."""

    def __str__(self) -> str:
        text = self.kernel + (f" (head dim {self.head_dim})" if self.head_dim else "")
        text += f", {self.heads} head{'' if self.heads == 1 else 's'}"
        text += f", {self.launches} launches" if self.launches > 1 else ""
        tiles = [
            f"{name} {'x'.join(str(s) for s in side)}"
            for name, side in (("queries", self.q_tile), ("keys", self.kv_tile))
            if side is not None
        ]
        text += f": tiles of {' and '.join(tiles)}" if tiles else ""
        if self.visited:
            text += f", {self.visited:,} visited, {self.full / self.visited:.0%} without a mask"
        return text


@dataclass(frozen=True)
class Pass:
    """The forward or the backward of a call."""

    steps: tuple[Step, ...] = ()
    workspace_bytes: int = 0
    """Beside inputs, outputs and the copies below."""
    copies: tuple[str, ...] = ()
    """Inputs that are copied first, because the kernels cannot read their strides."""
    refused: str | None = None
    """Why there is no kernel for this call."""
    because: str | None = None
    """Why the portable kernels run although nobody asked for them."""
    tile_bound: float | None = None
    """Largest speedup over dense attention with these tiles, counted in pairs of tiles."""

    @property
    def launches(self) -> int:
        return sum(step.launches for step in self.steps)

    @property
    def full_share(self) -> float | None:
        """Share of the visited tiles that needs no mask."""
        visited = sum(step.heads * step.visited for step in self.steps)
        return sum(step.heads * step.full for step in self.steps) / visited if visited else None

    def __str__(self) -> str:
        if self.refused:
            return f"refused: {self.refused}"
        head = f"{self.launches} launch{'' if self.launches == 1 else 'es'}, {_bytes(self.workspace_bytes)} of workspace"
        head += f", {self.tile_bound:.2f} times fewer tiles than dense attention" if self.tile_bound else ""
        head += f", copies {', '.join(self.copies)}" if self.copies else ""
        head += f"\n    portable kernels: {self.because}" if self.because else ""
        return "\n    ".join([head, *(str(step) for step in self.steps)])


@dataclass(frozen=True)
class NeighborhoodExplanation(_explain.Explanation):
    """What a call of ``neighborhood_attention`` runs."""

    call: str
    flop_bound: float
    """Largest speedup over dense attention that the arithmetic allows."""
    forward: Pass
    backward: Pass

    def __str__(self) -> str:
        return (
            f"{self.operator} on {self.architecture}: {self.call}\n"
            f"  arithmetic: {self.flop_bound:.2f} times less than dense attention\n"
            f"  forward: {self.forward}\n  backward: {self.backward}"
        )


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


@_explain.explains(op.neighborhood_attention)
def _explain_neighborhood_attention(
    architecture: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | Sequence[int | None] | Sequence[Sequence[int | None]] | None,
    *,
    stride: int | Sequence[int] | Sequence[Sequence[int]] = 1,
    dilation: int | Sequence[int] | Sequence[Sequence[int]] = 1,
    is_causal: bool | Sequence[bool] | Sequence[Sequence[bool]] = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    bias: Tensor | None = None,
    periodic: bool | Sequence[bool] = False,
    return_lse: bool = False,
    backend: str | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> NeighborhoodExplanation:
    def on_meta(t: Tensor | None) -> Tensor | None:
        return None if t is None else _runtime.autocast(t)[0].to("meta")

    q, k, v = (t.to("meta") for t in _runtime.autocast(q, k, v))
    extra_k, extra_v = on_meta(additional_keys), on_meta(additional_values)
    windows = op.check_arguments(q, k, v, extra_k, extra_v, kernel_size, stride, dilation, is_causal)
    bias = op.check_bias(None if bias is None else bias.to("meta"), q, windows[0])
    capability = 0 if architecture == "cpu" else int(architecture.removeprefix("sm_"))
    size, extra = q.shape[1:-2], 0 if additional_keys is None else additional_keys.shape[1]
    tokens, heads = prod(size), q.shape[-2]
    halos = op.periodic_halos(periodic, q, *windows, bias is not None)
    given, (q, k, v) = (q, k, v), op.with_halos(q, k, v, halos)

    def plan(capability: int, backward: bool) -> Any:
        deterministic = torch.are_deterministic_algorithms_enabled()
        return json.loads(
            torch.ops.nearfield.gna_plan(
                q, k, v, extra_k, extra_v, *windows, capability, backward, deterministic, backend, bias
            )
        )

    def one_pass(backward: bool) -> Pass:
        try:
            told = plan(capability, backward)
        except RuntimeError as error:
            return Pass(refused=_runtime.sentence(error))
        steps = tuple(_step(step) for step in told["steps"])
        bound = _tile_bound(steps, tokens, extra)
        copies, because = tuple(told["copies"]), told["because"] or None
        return Pass(steps, told["workspace_bytes"], copies, because=because, tile_bound=bound)

    # The CPU has a plan for every problem. A periodic border does not change the number of pairs.
    pairs = json.loads(
        torch.ops.nearfield.gna_plan(*given, extra_k, extra_v, *windows, 0, False, False, None, bias)
    )["pairs"]
    call = f"q {list(given[0].shape)} {str(q.dtype).removeprefix('torch.')}, kernel_size {windows[0]}"
    for name, values, default in zip(
        ("stride", "dilation", "is_causal"), windows[1:], (1, 1, 0), strict=True
    ):
        call += f", {name} {values}" if any(value != default for value in values) else ""
    call += f", {extra} additional tokens" if extra else ""
    call += ", bias" if bias is not None else ""
    if any(left + right for left, right in halos):
        call += f", periodic by a halo: a grid of {list(q.shape[1:-2])}, q, k and v copied"
    return NeighborhoodExplanation(
        operator="neighborhood_attention",
        architecture=architecture,
        call=call,
        flop_bound=heads * tokens * (tokens + extra) / max(1, pairs + heads * tokens * extra),
        forward=one_pass(False),
        backward=one_pass(True),
    )


def _step(told: dict[str, Any]) -> Step:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in told.items()}
    return Step(**fields)


def _tile_bound(steps: tuple[Step, ...], tokens: int, extra: int) -> float | None:
    """Pairs of tiles of dense attention over those that the steps visit, both weighted with the tiles' sizes."""
    visited = dense = 0
    for step in steps:
        if step.visited and step.q_tile and step.kv_tile:
            q, kv = prod(step.q_tile), prod(step.kv_tile)
            visited += step.heads * step.visited * q * kv
            columns = extra if step.additional else tokens
            dense += step.heads * -(-tokens // q) * -(-columns // kv) * q * kv
            # Kernels that hold queries meet the additional tokens in the same loop.
            if not step.kernel.startswith(("bwd_sm90", "bwd_dkv")):
                dense += step.heads * -(-tokens // q) * -(-extra // kv) * q * kv
    return dense / visited if visited else None
