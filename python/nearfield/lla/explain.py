"""What a call of local linear attention runs. The choice is that of the operator ``lla_plan``, which the kernels'
dispatch carries out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nearfield import _explain, _runtime
from nearfield.lla import neighborhood, op


@dataclass(frozen=True)
class LocalLinearExplanation(_explain.Explanation):
    """What a call of ``local_linear_attention``, ``probe_attention`` or their neighborhood forms runs, forward and
    backward alike."""

    call: str
    backend: str | None
    """``"hopper"``, ``"portable"`` or ``"cpu"``; None: there is no kernel."""
    head_dim: int | None = None
    """The compiled one; smaller head dims are padded with zeros. None on the CPU."""
    arithmetic: str | None = None
    """What the operands of the matrix products are; sums, statistics and the solver's vectors are float32."""
    weights: str | None = None
    """Of Hopper's kernels with a solve: ``"kept"`` in shared memory by the first pass, because no tile of queries
    sees many tiles of keys, or ``"recomputed"`` in every pass."""
    because: str | None = None
    """Why the portable kernels run although nobody asked for them."""
    refused: str | None = None
    """Why there is no kernel."""

    def __str__(self) -> str:
        text = f"{self.operator} on {self.architecture}: {self.call}\n  "
        if self.refused:
            return text + f"refused: {self.refused}"
        text += f"{self.backend} kernels" + (f", head dim {self.head_dim}" if self.head_dim else "")
        text += f", {self.arithmetic}" if self.arithmetic else ""
        text += f", weights {self.weights}" if self.weights else ""
        return text + (f"\n  portable: {self.because}" if self.because else "")


def _explain_call(
    name: str, architecture: str, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
) -> LocalLinearExplanation:
    q, k, v = (t.to("meta") for t in _runtime.autocast(q, k, v))
    window = options.get("window")
    op._check(name, q, k, v, None, window)
    call = f"q {list(q.shape)} {str(q.dtype).removeprefix('torch.')}, k {list(k.shape)}, v {list(v.shape)}"
    call += f", window {window}" if window is not None else ""
    packed, is_causal = options.get("cu_seqlens") is not None, options.get("is_causal", True)
    return _explain_kernels(
        name, architecture, call, q, k, v, (packed, is_causal, window, []), options.get("backend")
    )


def _explain_neighborhood(
    name: str,
    architecture: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: object,
    options: dict[str, Any],
) -> LocalLinearExplanation:
    q, k, v = (t.to("meta") for t in _runtime.autocast(q, k, v))
    windows = (options.get("stride", 1), options.get("dilation", 1), options.get("is_causal", False))
    boxes = neighborhood.boxes_of(name, q, k, v, kernel_size, *windows)
    call = f"q {list(q.shape)} {str(q.dtype).removeprefix('torch.')}, k {list(k.shape)}, v {list(v.shape)}"
    call += f", kernel_size {boxes.window}, boxes of {'x'.join(map(str, boxes.side))} tokens"
    q, k, v = (t.flatten(1, -3) for t in (q, k, v))
    seen = (False, False, None, boxes.grid)
    return _explain_kernels(name, architecture, call, q, k, v, seen, options.get("backend"))


def _explain_kernels(
    name: str,
    architecture: str,
    call: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: tuple[bool, bool, int | None, list[int]],
    backend: str | None,
) -> LocalLinearExplanation:
    """``seen``: packed, is_causal, window and grid."""
    if architecture == "cpu":
        return LocalLinearExplanation(name, architecture, call, "cpu")
    capability = int(architecture.removeprefix("sm_"))
    try:
        told = torch.ops.nearfield.lla_plan(q, k, v, capability, *seen, backend)
    except RuntimeError as error:
        refused = _runtime.sentence(error).removeprefix("lla: ")
        return LocalLinearExplanation(name, architecture, call, None, refused=refused)
    chosen, head_dim, *more = told.split(" ", 2)
    said = more[0] if more else None
    products = "3xTF32 products" if q.dtype == torch.float32 else "fp16 products over powers of two"
    return LocalLinearExplanation(
        name,
        architecture,
        call,
        chosen,
        int(head_dim),
        products,
        weights=said if chosen == "hopper" and "probe" not in name else None,
        because=said if chosen == "portable" else None,
    )


@_explain.explains(op.local_linear_attention)
def _explain_local_linear_attention(
    architecture: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    **options: Any,
) -> LocalLinearExplanation:
    return _explain_call("local_linear_attention", architecture, q, k, v, options)


@_explain.explains(op.probe_attention)
def _explain_probe_attention(
    architecture: str,
    q: Tensor,
    x: Tensor,
    k: Tensor,
    v: Tensor,
    **options: Any,
) -> LocalLinearExplanation:
    return _explain_call("probe_attention", architecture, q, k, v, options)


@_explain.explains(neighborhood.neighborhood_local_linear_attention)
def _explain_neighborhood_local_linear_attention(
    architecture: str, q: Tensor, k: Tensor, v: Tensor, kernel_size: object, **options: Any
) -> LocalLinearExplanation:
    name = "neighborhood_local_linear_attention"
    return _explain_neighborhood(name, architecture, q, k, v, kernel_size, options)


@_explain.explains(neighborhood.neighborhood_probe_attention)
def _explain_neighborhood_probe_attention(
    architecture: str, q: Tensor, x: Tensor, k: Tensor, v: Tensor, kernel_size: object, **options: Any
) -> LocalLinearExplanation:
    name = "neighborhood_probe_attention"
    return _explain_neighborhood(name, architecture, q, k, v, kernel_size, options)
