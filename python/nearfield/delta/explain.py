"""What a call of the delta rule runs. The choice comes from the operator ``delta_plan``, which the kernels' dispatch
asks too."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from nearfield import _explain, _runtime
from nearfield.delta import op

_KERNELS = {
    ("hopper", False): ("prepare_sm90", "state_pass_sm90"),
    ("hopper", True): ("reverse_pass_sm90", "{gradient}", "finish_gradient_sm90"),
    ("portable", False): ("prepare_sm80", "walk_sm80"),
    ("portable", True): ("prepare_sm80", "walk_sm80", "gradient_sm80"),
}


@dataclass(frozen=True)
class Pass:
    """The forward or the backward of a call."""

    backend: str | None = None
    """``"hopper"``, ``"portable"`` or ``"cpu"``; None: refused."""
    kernels: tuple[str, ...] = ()
    """In the order of their launches."""
    because: str | None = None
    """Why the portable kernels run although nobody asked for them."""
    refused: str | None = None
    """Why there is no kernel for this call."""
    instead: str | None = None
    """One kernel in place of these, where shapes and the number of clusters that the device runs at once make it faster."""

    def __str__(self) -> str:
        if self.refused:
            return f"refused: {self.refused}"
        text = f"{self.backend}" + (f": {', '.join(self.kernels)}" if self.kernels else "")
        text += f"\n    or {self.instead}, where that is faster on the device" if self.instead else ""
        return text + (f"\n    portable kernels: {self.because}" if self.because else "")


@dataclass(frozen=True)
class DeltaExplanation(_explain.Explanation):
    """What a call of ``delta_rule`` runs."""

    call: str
    forward: Pass
    backward: Pass

    def __str__(self) -> str:
        head = f"{self.operator} on {self.architecture}: {self.call}"
        return f"{head}\n  forward: {self.forward}\n  backward: {self.backward}"


@_explain.explains(op.delta_rule)
def _explain_delta_rule(
    architecture: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    recompute: bool = False,
    backend: str | None = None,
    cu_seqlens: Tensor | None = None,
    **options: object,
) -> DeltaExplanation:
    q, k, v = (t.to("meta") for t in _runtime.autocast(q, k, v))
    beta, g = beta.to("meta"), None if g is None else g.to("meta")
    gates = "no gate" if g is None else f"a gate per {'head' if g.dim() == 3 else 'channel'}"
    shapes = f"q {list(q.shape)}, v {list(v.shape)} {str(q.dtype).removeprefix('torch.')}, {gates}"
    if architecture == "cpu":
        return DeltaExplanation("delta_rule", architecture, shapes, Pass("cpu"), Pass("cpu"))
    capability = int(architecture.removeprefix("sm_"))
    forward, backward = (_pass(q, k, v, beta, g, capability, way, backend) for way in (False, True))
    if (
        forward.backend == "hopper"
        and cu_seqlens is None
        and (g is None or g.dim() == 3)
        and 64 < v.shape[3] <= 128
    ):
        forward = replace(forward, instead="head_cluster_sm90")
    if backward.backend == "hopper" and (recompute or forward.backend != "hopper"):
        backward = replace(backward, kernels=_KERNELS["hopper", False] + backward.kernels)
    return DeltaExplanation("delta_rule", architecture, shapes, forward, backward)


def _pass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    capability: int,
    backward: bool,
    backend: str | None,
) -> Pass:
    try:
        name, because = op.plan(q, k, v, beta, g, capability, backward, backend)
    except RuntimeError as error:
        return Pass(refused=_runtime.sentence(error))
    channel_gate = g is not None and g.dim() == 4
    gradient = "chunk_gradient_channel_sm90" if channel_gate else "chunk_gradient_sm90"
    kernels = tuple(kernel.format(gradient=gradient) for kernel in _KERNELS[name, backward])
    return Pass(name, kernels, because or None)
