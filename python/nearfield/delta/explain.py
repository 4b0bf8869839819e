"""What a call of the delta rule runs. The backend comes from the operator ``delta_plan`` and the way Hopper's forward
divides its work from the planner; the kernels' dispatch asks both, too."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from nearfield import _explain, _runtime
from nearfield.delta import op

try:
    from nearfield import _planner
except ImportError:  # a portable wheel
    _planner = None  # type: ignore[assignment]

_KERNELS = {
    ("hopper", False): ("prepare_sm90", "state_pass_sm90"),
    ("hopper", True): ("reverse_pass_sm90", "{gradient}", "finish_gradient_sm90"),
    ("portable", False): ("prepare_sm80", "walk_sm80"),
    ("portable", True): ("prepare_sm80", "walk_sm80", "gradient_sm80"),
}
# What an H100 has: multiprocessors, and clusters of head_cluster_sm90 that run at once.
_H100_SMS, _H100_CLUSTERS = 132, 30


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
    plan: str | None = None
    """How Hopper's forward divides its work on an H100, which it does by the size of the device."""

    def __str__(self) -> str:
        if self.refused:
            return f"refused: {self.refused}"
        text = f"{self.backend}" + (f": {', '.join(self.kernels)}" if self.kernels else "")
        text += f"\n    on an H100: {self.plan}" if self.plan else ""
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
    differentiated = _runtime.differentiated((q, k, v, beta, g, *options.values()))
    q, k, v = (t.to("meta") for t in _runtime.autocast(q, k, v))
    beta, g = beta.to("meta"), None if g is None else g.to("meta")
    gates = "no gate" if g is None else f"a gate per {'head' if g.dim() == 3 else 'channel'}"
    shapes = f"q {list(q.shape)}, v {list(v.shape)} {str(q.dtype).removeprefix('torch.')}, {gates}"
    if architecture == "cpu":
        return DeltaExplanation("delta_rule", architecture, shapes, Pass("cpu"), Pass("cpu"))
    capability = int(architecture.removeprefix("sm_"))
    forward, backward = (_pass(q, k, v, beta, g, capability, way, backend) for way in (False, True))
    if forward.backend == "hopper":
        keep = differentiated and backward.backend == "hopper" and not recompute
        kernels, plan = _plan(q, v, g, cu_seqlens, keep)
        forward = replace(forward, kernels=kernels, plan=plan)
    if backward.backend == "hopper" and (recompute or forward.backend != "hopper"):
        backward = replace(backward, kernels=_KERNELS["hopper", False] + backward.kernels)
    return DeltaExplanation("delta_rule", architecture, shapes, forward, backward)


def _plan(
    q: Tensor, v: Tensor, g: Tensor | None, cu_seqlens: Tensor | None, keep: bool
) -> tuple[tuple[str, ...], str]:
    """The kernels of Hopper's forward, and how they divide the work."""
    if _planner is None:
        return _KERNELS["hopper", False], "not known, this build has no planner (a portable wheel)"
    batch, tokens, heads, values = v.shape
    span_chunks, prepare_p, preparing, clusters, rest = _planner.delta_plan(
        sequences=batch if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        tokens=tokens,
        value_heads=heads,
        heads=q.shape[2],
        key_dim=64 if q.shape[3] <= 64 and not keep else 128,
        value_dim=values,
        packed=cu_seqlens is not None,
        channel_gate=g is not None and g.dim() == 4,
        keep=keep,
        sms=_H100_SMS,
        clusters=_H100_CLUSTERS,
    )
    split_kernels = ("prepare_sm90", "state_pass_sm90", "compose_spans_sm90", "state_pass_sm90")
    spans = f"split into spans of {span_chunks * op.CHUNK} tokens"
    if clusters:
        cut = sum(part[4] >= 0 for parts in clusters for part in parts)
        how = ""
        if cut and keep:
            how = f", {cut} heads cut in two for clusters that go on"
        elif cut:
            how = f", {cut} of {len(clusters)} begin where another has ended"
        kernels: tuple[str, ...] = ("head_cluster_sm90",)
        if rest:
            kernels += split_kernels if span_chunks else _KERNELS["hopper", False]
            how = f"; beside them {rest} more on {preparing} multiprocessors"
            how += f", {spans}" if span_chunks else ""
        return kernels, f"a cluster of four thread blocks per head{how}"
    if span_chunks:
        return split_kernels, f"sequences {spans}"
    if preparing:
        return _KERNELS["hopper", False], f"{preparing} multiprocessors prepare chunks beside the walk"
    where = "before the walk" if prepare_p else "before the walk, which computes P"
    return _KERNELS["hopper", False], f"chunks prepared {where}"


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
