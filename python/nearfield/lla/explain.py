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
        return text + (f"\n  portable: {self.because}" if self.because else "")


def _explain_call(
    name: str, architecture: str, q: Tensor, k: Tensor, v: Tensor, backend: str | None, window: int | None
) -> LocalLinearExplanation:
    q, k, v = (t.to("meta") for t in _runtime.autocast(q, k, v))
    op._check(name, q, k, v, None, window)
    call = f"q {list(q.shape)} {str(q.dtype).removeprefix('torch.')}, k {list(k.shape)}, v {list(v.shape)}"
    call += f", window {window}" if window is not None else ""
    return _explain_kernels(name, architecture, call, q, v, backend)


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
    return _explain_kernels(
        name, architecture, call, q.flatten(1, -3), v.flatten(1, -3), options.get("backend")
    )


def _explain_kernels(
    name: str, architecture: str, call: str, q: Tensor, v: Tensor, backend: str | None
) -> LocalLinearExplanation:
    if architecture == "cpu":
        return LocalLinearExplanation(name, architecture, call, "cpu")
    capability = int(architecture.removeprefix("sm_"))
    try:
        told = torch.ops.nearfield.lla_plan(q, v, capability, backend)
    except RuntimeError as error:
        refused = _runtime.sentence(error).removeprefix("lla: ")
        return LocalLinearExplanation(name, architecture, call, None, refused=refused)
    chosen, head_dim, *because = told.split(" ", 2)
    products = "3xTF32 products" if q.dtype == torch.float32 else "fp16 products over powers of two"
    return LocalLinearExplanation(
        name,
        architecture,
        call,
        chosen,
        int(head_dim),
        products,
        because[0] if because else None,
    )


@_explain.explains(op.local_linear_attention)
def _explain_local_linear_attention(
    architecture: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    backend: str | None = None,
    **_: Any,
) -> LocalLinearExplanation:
    return _explain_call("local_linear_attention", architecture, q, k, v, backend, window)


@_explain.explains(op.probe_attention)
def _explain_probe_attention(
    architecture: str,
    q: Tensor,
    x: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    backend: str | None = None,
    **_: Any,
) -> LocalLinearExplanation:
    return _explain_call("probe_attention", architecture, q, k, v, backend, window)


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
