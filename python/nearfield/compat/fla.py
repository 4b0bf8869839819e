"""fla's delta-rule functions with nearfield's kernels: the signatures of flash-linear-attention 0.6, and two switches.

Either import from here instead of from fla::

    from nearfield.compat.fla import chunk_gated_delta_rule

or leave a program as it is and call :func:`register`, which enters nearfield into fla's own choice of backends, or
:func:`patch`, which swaps the functions wherever they were imported to, fla's layers included.

Layouts, defaults and states are fla's: token tensors ``[B, T, heads, channels]``, states ``[N, HV, K, V]``. All of
them have gradients here, the recurrent ones too, and take float32 and the CPU. Arguments that only guide fla's kernels
(cu_seqlens_cpu, chunk_indices, chunk_size, safe_gate, disable_recompute) change no result there and are not needed
here. What would change a result and is not supported raises.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nearfield import delta
from nearfield.compat._swap import Swap
from nearfield.delta.op import FWD_DEVICES, MAX_STEP, BetaActivation, Gate

__all__ = [
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "chunk_kda",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_kda",
    "patch",
    "patched",
    "register",
    "unpatch",
    "unregister",
]

Result = tuple[Tensor, Tensor | None]


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **kwargs: Any,
) -> Result:
    """DeltaNet, see :func:`nearfield.delta_rule`. Returns ``o [B, T, H, V]`` and the final state or None."""
    _options("chunk_delta_rule", kwargs)
    return _delta_rule(
        "chunk_delta_rule", q, k, v, beta, None, scale, initial_state, output_final_state,
        use_qk_l2norm_in_kernel, cu_seqlens,
    )  # fmt: skip


def fused_recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """DeltaNet, see :func:`nearfield.delta_rule`; without beta it is 1."""
    return _delta_rule(
        "fused_recurrent_delta_rule", q, k, v, beta, None, scale, initial_state, output_final_state,
        use_qk_l2norm_in_kernel, cu_seqlens,
    )  # fmt: skip


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: object = None,
    **kwargs: Any,
) -> Result:
    """Gated DeltaNet, see :func:`nearfield.delta_rule`.

    Further keywords: use_gate_in_kernel, with A_log ``[HV]`` and dt_bias ``[HV]``: g holds what goes into
    ``-exp(A_log) softplus(g + dt_bias)``.
    """
    op = "chunk_gated_delta_rule"
    _refuse(op, cp_context=cp_context)
    state_v_first = _v_first(op, state_v_first, kwargs)
    options = _options(op, kwargs, "use_gate_in_kernel", "A_log", "dt_bias")
    return _delta_rule(
        op, q, k, v, beta, g, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens,
        use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, **options,
    )  # fmt: skip


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> Result:
    """Gated DeltaNet with a decay per head g ``[B, T, HV]``, per channel gk ``[B, T, HV, K]``, or both.

    See :func:`nearfield.delta_rule`. Decays of the value channels, gv, are not supported.
    """
    op = "fused_recurrent_gated_delta_rule"
    _refuse(op, gv=gv)
    state_v_first = _v_first(op, state_v_first, kwargs)
    _options(op, kwargs)
    if gk is not None:
        if use_gate_in_kernel:
            raise NotImplementedError(
                f"{op}: gk together with use_gate_in_kernel is not supported; give log decays"
            )
        g = gk if g is None else g.unsqueeze(-1) + gk
    return _delta_rule(
        op, q, k, v, beta, g, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens,
        use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, use_gate_in_kernel, A_log, dt_bias,
    )  # fmt: skip


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: object = None,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
    **kwargs: Any,
) -> Result:
    """KDA, with a decay per channel g ``[B, T, HV, K]``; see :func:`nearfield.delta_rule`.

    With use_gate_in_kernel, g holds what goes into ``-exp(A_log) softplus(g + dt_bias)`` or, with lower_bound, into
    ``lower_bound * sigmoid(exp(A_log) (g + dt_bias))``, where A_log ``[HV]`` may be absent; dt_bias is ``[HV * K]``.
    Without it, lower_bound only promises fla something about g.
    """
    op = "chunk_kda"
    _refuse(
        op,
        cp_context=cp_context,
        return_intermediate_states=return_intermediate_states or None,
        use_graph=use_graph or None,
        max_num_seqs=max_num_seqs,
    )
    if safe_gate and use_gate_in_kernel and lower_bound is None:
        raise ValueError(f"{op}: safe_gate together with use_gate_in_kernel needs lower_bound")
    state_v_first = _v_first(op, state_v_first, kwargs)
    options = _options(op, kwargs, "A_log", "dt_bias")
    return _delta_rule(
        op, q, k, v, beta, g, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens,
        use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, use_gate_in_kernel,
        lower_bound=lower_bound, **options,
    )  # fmt: skip


def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> Result:
    """KDA; the gate as in :func:`chunk_kda`."""
    op = "fused_recurrent_kda"
    state_v_first = _v_first(op, state_v_first, kwargs)
    _options(op, kwargs)
    return _delta_rule(
        op, q, k, v, beta, g, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens,
        use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, use_gate_in_kernel, A_log, dt_bias,
        lower_bound,
    )  # fmt: skip


_FUNCTIONS: tuple[Callable[..., Result], ...] = (
    chunk_delta_rule,
    fused_recurrent_delta_rule,
    chunk_gated_delta_rule,
    fused_recurrent_gated_delta_rule,
    chunk_kda,
    fused_recurrent_kda,
)


def _delta_rule(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    l2norm: bool,
    cu_seqlens: Tensor | None,
    beta_sigmoid: bool = False,
    neg_eigval: bool = False,
    state_v_first: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
) -> Result:
    """fla's conventions on the left, :func:`nearfield.delta_rule`'s on the right."""
    if neg_eigval and not beta_sigmoid:
        raise ValueError(
            f"{op}: allow_neg_eigval needs use_beta_sigmoid_in_kernel; otherwise scale beta yourself"
        )
    activation: BetaActivation = ("sigmoid2" if neg_eigval else "sigmoid") if beta_sigmoid else "none"
    if beta is None:
        beta, activation = v.new_ones(v.shape[:3]), "none"
    gate: Gate = "log"
    if use_gate_in_kernel:
        if g is None or (A_log is None and lower_bound is None):
            raise ValueError(f"{op}: use_gate_in_kernel needs g, and A_log or lower_bound")
        if lower_bound is not None and not -5 <= lower_bound < 0:
            raise ValueError(f"{op}: lower_bound is {lower_bound}, expected a number in [-5, 0)")
        gate = "softplus" if lower_bound is None else "bounded"
    else:
        A_log = dt_bias = None  # as in fla, they belong to the gate
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    beta, g, A_log, dt_bias = (
        t if t is None or t.dtype in (q.dtype, exact) else t.to(exact) for t in (beta, g, A_log, dt_bias)
    )
    assert beta is not None
    state = None if initial_state is None else initial_state.to(exact)
    arguments: dict[str, Any] = {
        "scale": scale, "use_qk_l2norm": l2norm, "beta_activation": activation, "gate": gate, "A_log": A_log,
        "dt_bias": dt_bias, "state_v_first": state_v_first,
    }  # fmt: skip
    if lower_bound is not None and gate == "bounded":
        arguments["gate_bound"] = lower_bound
    if cu_seqlens is None and 1 <= q.shape[1] <= MAX_STEP and not torch.is_grad_enabled():
        K, (HV, V) = q.shape[3], v.shape[2:]
        shape = (q.shape[0], HV, V, K) if state_v_first else (q.shape[0], HV, K, V)
        # The step writes into the state it is given, and fla's callers do not expect theirs to change.
        pool = q.new_zeros(shape, dtype=exact) if state is None else state.clone()
        o = delta.delta_rule_step(q, k, v, beta, g, state=pool, **arguments)
        return o, pool if output_final_state else None
    return delta.delta_rule(
        q, k, v, beta, g, initial_state=state, output_final_state=output_final_state, cu_seqlens=cu_seqlens, **arguments
    )  # fmt: skip


def _refuse(op: str, **given: object) -> None:
    for name, value in given.items():
        if value is not None:
            raise NotImplementedError(f"{op}: {name} is not supported by nearfield; leave it out")


def _options(op: str, kwargs: dict[str, Any], *known: str) -> dict[str, Any]:
    """Those of the keywords that have a meaning; a chunk size is fla's own business."""
    left = {name: value for name, value in kwargs.items() if name not in (*known, "chunk_size")}
    if left:
        raise TypeError(f"{op}: got unexpected arguments {', '.join(left)}")
    return {name: kwargs[name] for name in known if name in kwargs}


def _v_first(op: str, state_v_first: bool, kwargs: dict[str, Any]) -> bool:
    if "transpose_state_layout" not in kwargs:
        return state_v_first
    if state_v_first:
        raise ValueError(f"{op}: give state_v_first or its old name transpose_state_layout, not both")
    warnings.warn(f"{op}: transpose_state_layout is now state_v_first", DeprecationWarning, stacklevel=3)
    return bool(kwargs.pop("transpose_state_layout"))


def _import_fla(function: str, *names: str) -> list[ModuleType]:
    try:
        return [importlib.import_module(f"fla.{name}") for name in names]
    except ImportError as error:
        raise ImportError(
            f"nearfield.compat.fla.{function}: flash-linear-attention 0.6 cannot be imported ({error})"
        ) from error


_SWAP = Swap()


def patch() -> None:
    """Makes an installed fla run its six delta-rule functions on nearfield, wherever they were already imported to.

    A second call changes nothing.
    """
    modules = _import_fla("patch", "ops.delta_rule", "ops.gated_delta_rule", "ops.kda")
    owners = [module for module in modules for _ in range(2)]
    _SWAP.install([(getattr(m, f.__name__), f) for m, f in zip(owners, _FUNCTIONS, strict=True)])


def unpatch() -> None:
    """Undoes :func:`patch`."""
    _SWAP.remove()


@contextmanager
def patched() -> Iterator[None]:
    """``with patched():`` fla runs on nearfield. Inside an earlier :func:`patch` it changes nothing."""
    before = _SWAP.installed
    patch()
    try:
        yield
    finally:
        if not before:
            unpatch()


_REGISTERED: list[tuple[Any, str]] = []
"""fla's registries that hold our backend, and its name there."""


def register() -> None:
    """Enters nearfield into fla's registry of backends, before fla's own ones: chunk_gated_delta_rule and chunk_kda.

    fla asks the backend before every call and logs a refusal: on a device for which this build has no kernel, or with
    arguments that are not supported, fla goes on with its next backend. fla has no registry for its other functions;
    :func:`patch` reaches them. The environment variable ``FLA_NEARFIELD=0`` switches the backend off.
    """
    if _REGISTERED:
        return
    backends, kda, _ = _import_fla("register", "backends", "ops.kda", "ops.gated_delta_rule")

    def usable(q: Tensor, *args: Any, **kwargs: Any) -> tuple[bool, str | None]:
        if q.device.type not in FWD_DEVICES:
            return False, f"no nearfield kernel for device {q.device} in this build"
        unsupported = ("cp_context", "return_intermediate_states", "use_graph", "max_num_seqs")
        given = [name for name in unsupported if kwargs.get(name)]
        return (False, f"nearfield does not support {given[0]}") if given else (True, None)

    class Nearfield(backends.BaseBackend):  # type: ignore[misc, name-defined]
        backend_type = "nearfield"
        package_name = "nearfield"
        env_var = "FLA_NEARFIELD"
        priority = 1

        chunk_gated_delta_rule_verifier = staticmethod(usable)
        chunk_kda_verifier = staticmethod(usable)
        chunk_gated_delta_rule = staticmethod(chunk_gated_delta_rule)
        chunk_kda = staticmethod(chunk_kda)

    backends.register("gated_delta_rule")(Nearfield)
    backends.register(kda.chunk_kda)(Nearfield)
    for registry in (*backends._operation_registries.values(), *backends._function_registries.values()):
        if "nearfield" in registry._backends:
            _REGISTERED.append((registry, "nearfield"))


def unregister() -> None:
    """Undoes :func:`register`."""
    for registry, name in _REGISTERED:
        registry._backends.pop(name, None)
    _REGISTERED.clear()
