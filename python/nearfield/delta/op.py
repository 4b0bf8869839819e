"""``delta_rule`` and ``delta_rule_step``: public functions, fake kernels, autograd rule."""

from __future__ import annotations

import functools
import logging
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor

from nearfield import _runtime

BetaActivation = Literal["none", "sigmoid", "sigmoid2"]
Gate = Literal["log", "softplus", "bounded"]

BETA_ACTIVATIONS = {"none": 0, "sigmoid": 1, "sigmoid2": 2}
GATES = {"log": 0, "softplus": 1, "bounded": 2}
BACKENDS = ("hopper", "portable")
MAX_STEP = 8
CHUNK = 64  # tokens

_log = logging.getLogger("nearfield")

FWD_DEVICES = _runtime.devices_with_kernel("delta_fwd")
STEP_DEVICES = _runtime.devices_with_kernel("delta_step")


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm: bool = False,
    beta_activation: BetaActivation = "none",
    gate: Gate = "log",
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    gate_bound: float = -5.0,
    state_v_first: bool = False,
    recompute: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention that corrects its memory: DeltaNet, Gated DeltaNet or KDA, by the shape of g.

    Per token and value head, with ``alpha = exp(g)``::

        S <- alpha . S;   r = v - S^T k;   S <- S + beta k r^T;   o = scale S^T q

    Args:
        q, k: ``[B, T, H, K]``. Keys should have unit norm (or pass ``use_qk_l2norm``): otherwise the memory
            can grow exponentially.
        v: ``[B, T, HV, V]``; HV is a multiple of H, value head j uses query/key head ``j // (HV // H)``.
        beta: write strength ``[B, T, HV]``, in q's dtype or float32.
        g: log decay, at most 0 (``-inf`` forgets everything): absent for DeltaNet, ``[B, T, HV]`` for Gated
            DeltaNet, ``[B, T, HV, K]`` for KDA; in q's dtype or float32 (better).
        scale: factor on the output; default ``K ** -0.5``.
        initial_state: ``[N, HV, K, V]`` in float32 (float64 for float64 inputs); default zero. N is B, or the
            number of packed sequences.
        output_final_state: also return the state after the last token of each sequence, like initial_state.
        cu_seqlens: ``[N + 1]`` int32 or int64, starting with 0: the batch of 1 holds N sequences end to end.
            Empty sequences are fine; tokens past the last one give zeros.
        use_qk_l2norm: q and k are divided by ``sqrt(sum of squares + 1e-6)``.
        beta_activation: "sigmoid" or "sigmoid2" (twice the sigmoid) if beta holds logits.
        gate: how g is meant. "log": it is the log decay. "softplus": ``-exp(A_log) * softplus(g + dt_bias)``.
            "bounded": ``gate_bound * sigmoid(exp(A_log) * (g + dt_bias))``.
        A_log: ``[HV]``, needed by "softplus", optional for "bounded" (factor 1).
        dt_bias: ``[HV]``, or ``[HV, K]`` (also flat) with a gate per channel; optional.
        gate_bound: lower bound of the log decay for "bounded", in [-5, 0).
        state_v_first: states are ``[N, HV, V, K]``.
        recompute: how the gradient on a Hopper GPU comes by the state that enters each chunk of 64 tokens. False: the
            forward keeps it, and more, until the gradient has run: ``156 + 6 V`` bytes per token and value head
            (924 at V = 128; V rounded up to a multiple of 64), ``1288`` more with a gate per channel. True: only
            the inputs are kept, and the gradient walks over the sequence once more, which takes longer (README.md of
            csrc/delta has times). Without a gradient, and on other devices and backends, nothing is ever kept.
        backend: CUDA only. ``"hopper"``: the kernels for compute capability 9.0 (bfloat16 and float16, head dims that
            are multiples of 8); ``"portable"``: those for every GPU since Ampere (float32 too, K up to 256, any V);
            None: hopper where it serves the call, else portable, forward and backward each for itself. Where that
            leaves a Hopper GPU's own kernels aside, the logger ``nearfield`` warns once per reason.
            ``nearfield.explain`` tells which.

    Raises:
        RuntimeError: the GPU, the dtype or the head dims are not supported (by the backend asked for).

    Returns:
        ``o [B, T, HV, V]`` in q's dtype and the final state, or None without ``output_final_state``.
    """
    q, k, v, scale = check_rule(
        "delta_rule", q, k, v, beta, g, scale, initial_state, cu_seqlens, beta_activation, gate, A_log, dt_bias,
        gate_bound, state_v_first,
    )  # fmt: skip
    _check_backend("delta_rule", backend, q, k, v, beta, g)
    inputs = (q, k, v, beta, g, initial_state, A_log, dt_bias)
    keeps = _runtime.differentiated(inputs) and not recompute
    forward = _forward_kept if keeps else _forward
    o, final_state = forward(
        q, k, v, beta, g, initial_state, A_log, _flat(dt_bias), cu_seqlens,
        scale, use_qk_l2norm, BETA_ACTIVATIONS[beta_activation], GATES[gate], gate_bound, state_v_first,
        output_final_state, backend,
    )[:2]  # fmt: skip
    return o, final_state if output_final_state else None


def delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    state: Tensor,
    read_idx: Tensor | None = None,
    write_idx: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    beta_activation: BetaActivation = "none",
    gate: Gate = "log",
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    gate_bound: float = -5.0,
    state_v_first: bool = False,
) -> Tensor:
    """Decoding: :func:`delta_rule` for the next 1 to 8 tokens of each row, with states updated in a pool.

    Args:
        q, k, v, beta, g: as in :func:`delta_rule`, with T from 1 to 8.
        state: the pool ``[P, HV, K, V]`` (``[P, HV, V, K]`` if state_v_first) in float32 or bfloat16 (float64
            for float64 inputs). Dense but for its first stride, which may be padded.
        read_idx: ``[B]`` int32 or int64, the slot from which each row starts; default ``0 .. B - 1``. A
            negative entry makes the row inactive: nothing is read or written, its output is 0.
        write_idx: ``[B]``, the slot that receives the state after the last token; or ``[B, T]``, the slots
            that receive the state after each token (for speculative decoding). Negative: that state is not
            written. Default: read_idx.

    No slot may be written by two rows, or written by one row and read by another. There is no gradient.

    An index past the pool is an error on the CPU. On CUDA nobody waits for the device to look at indices: such a row
    reads and writes nothing and its output is NaN.

    Returns:
        ``o [B, T, HV, V]`` in q's dtype.
    """
    op = "delta_rule_step"
    q, k, v, scale = _check_step(
        op, q, k, v, beta, g, state, read_idx, write_idx, scale, beta_activation, gate, A_log, dt_bias, gate_bound,
        state_v_first, per_token=True,
    )  # fmt: skip
    o: Tensor = torch.ops.nearfield.delta_step(
        q, k, v, beta, g, state, read_idx, write_idx, A_log, _flat(dt_bias),
        scale, use_qk_l2norm, BETA_ACTIVATIONS[beta_activation], GATES[gate], gate_bound, state_v_first,
    )  # fmt: skip
    return o


class PendingTokens(NamedTuple):
    """Tokens that :func:`delta_rule_verify` has run and the pool does not hold yet: K + V + G numbers per token and
    head, where a state has K V. In float32 (float64 for float64 inputs); ``S <- exp(g) S + k u^T`` replays one."""

    k: Tensor
    """Keys ``[B, T, H, K]``, normalised if the call normalised."""
    u: Tensor
    """What was written under the keys, ``beta (v - S^T k)``: ``[B, T, HV, V]``."""
    g: Tensor
    """Log decays ``[B, T, HV, G]``: G is 0 without a gate, 1 with one per head, K with one per channel."""


def delta_rule_verify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    state: Tensor,
    pending: PendingTokens | None = None,
    accepted: Tensor | None = None,
    read_idx: Tensor | None = None,
    write_idx: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    beta_activation: BetaActivation = "none",
    gate: Gate = "log",
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    gate_bound: float = -5.0,
    state_v_first: bool = False,
) -> tuple[Tensor, PendingTokens]:
    """Speculative decoding: runs 1 to 8 drafted tokens of each row without writing them to the pool.

    Each call commits what was accepted of the tokens of the call before, and runs the next draft on top, in one
    pass over the state. One state per token, which ``delta_rule_step`` with ``write_idx [B, T]`` writes, is never
    needed::

        out, pending = delta_rule_verify(*draft, state=pool)
        while ...:
            accepted = ...  # [B]: how many tokens of each row's draft hold
            out, pending = delta_rule_verify(*draft, state=pool, pending=pending, accepted=accepted)
        delta_rule_commit(pending, accepted, state=pool)

    Args:
        q, k, v, beta, g, state, read_idx and the options: as in :func:`delta_rule_step`.
        pending: what the call before returned, if any.
        accepted: ``[B]`` int32 or int64, how many of each row's pending tokens to keep, from the first.
        write_idx: ``[B]``, the slot that receives the state after the accepted tokens; default read_idx. Without
            pending no state is written.

    On CUDA a number of accepted tokens out of range gives NaN, as an index out of range does.

    Returns:
        ``o [B, T, HV, V]`` in q's dtype, and the tokens for the next call.
    """
    op = "delta_rule_verify"
    _check_pending(op, pending, accepted, q)
    q, k, v, scale = _check_step(
        op, q, k, v, beta, g, state, read_idx, write_idx, scale, beta_activation, gate, A_log, dt_bias, gate_bound,
        state_v_first, per_token=False,
    )  # fmt: skip
    o, *after = torch.ops.nearfield.delta_verify(
        q, k, v, beta, g, state, read_idx, write_idx, *(pending or (None, None, None)), accepted, A_log,
        _flat(dt_bias), scale, use_qk_l2norm, BETA_ACTIVATIONS[beta_activation], GATES[gate], gate_bound,
        state_v_first,
    )  # fmt: skip
    return o, PendingTokens(*after)


def delta_rule_commit(
    pending: PendingTokens,
    accepted: Tensor,
    *,
    state: Tensor,
    read_idx: Tensor | None = None,
    write_idx: Tensor | None = None,
    state_v_first: bool = False,
) -> None:
    """Writes the accepted tokens of :func:`delta_rule_verify` to the pool, without running new ones.

    The arguments are those of ``delta_rule_verify``.
    """
    op = "delta_rule_commit"
    _check_pending(op, pending, accepted, state)
    _check_indices(op, pending.k.shape[0], 0, state, read_idx, write_idx, per_token=False)
    _runtime.check_device(op, state, STEP_DEVICES)
    torch.ops.nearfield.delta_commit(state, *pending, accepted, read_idx, write_idx, state_v_first)


def check_rule(
    op: str, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, scale: float | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, beta_activation: str, gate: str, A_log: Tensor | None,
    dt_bias: Tensor | None, gate_bound: float, state_v_first: bool,
) -> tuple[Tensor, Tensor, Tensor, float]:  # fmt: skip
    """What ``delta_rule`` and its kin ask of their inputs. Returns q, k, v as autocast wants them, and the scale."""
    _check_inputs(op, q, k, v, beta, g, A_log, dt_bias, initial_state=initial_state, cu_seqlens=cu_seqlens)
    q, k, v = _runtime.autocast(q, k, v)
    _check_options(op, q, k, v, beta, g, A_log, dt_bias, beta_activation, gate, gate_bound)
    (B, _, _, K), (HV, V) = q.shape, v.shape[2:]
    sequences = B
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
            _runtime.shape_error(op, "cu_seqlens", cu_seqlens, "[N + 1]")
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{op}: cu_seqlens has dtype {cu_seqlens.dtype}; supported: int32, int64")
        if B != 1:
            raise ValueError(f"{op}: cu_seqlens packs sequences into a batch of 1, but q has batch {B}")
        sequences = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        _check_state(op, "initial_state", initial_state, q, [sequences, HV, K, V], state_v_first)
    _runtime.check_device(op, q, FWD_DEVICES)
    return q, k, v, K**-0.5 if scale is None else float(scale)


def _check_step(
    op: str, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, read_idx: Tensor | None,
    write_idx: Tensor | None, scale: float | None, beta_activation: str, gate: str, A_log: Tensor | None,
    dt_bias: Tensor | None, gate_bound: float, state_v_first: bool, per_token: bool,
) -> tuple[Tensor, Tensor, Tensor, float]:  # fmt: skip
    """What both kinds of step ask of their inputs. Returns q, k, v as autocast wants them, and the scale."""
    _check_inputs(op, q, k, v, beta, g, A_log, dt_bias, state=state, read_idx=read_idx, write_idx=write_idx)
    inputs = (q, k, v, beta, g, A_log, dt_bias, state)
    if _runtime.differentiated(inputs):
        raise ValueError(f"{op}: has no gradient, but an input requires one; call it under torch.no_grad()")
    q, k, v = _runtime.autocast(q, k, v)
    _check_options(op, q, k, v, beta, g, A_log, dt_bias, beta_activation, gate, gate_bound)
    (B, T, _, K), (HV, V) = q.shape, v.shape[2:]
    if not 1 <= T <= MAX_STEP:
        raise ValueError(f"{op}: q has {T} tokens; supported: 1 to {MAX_STEP}")
    _check_indices(op, B, T, state, read_idx, write_idx, per_token)
    _check_state(op, "state", state, q, [None, HV, K, V], state_v_first, also=torch.bfloat16)
    _runtime.check_device(op, q, STEP_DEVICES)
    return q, k, v, K**-0.5 if scale is None else float(scale)


def _check_indices(
    op: str, B: int, T: int, state: Tensor, read_idx: Tensor | None, write_idx: Tensor | None, per_token: bool
) -> None:
    if state.dim() == 4 and read_idx is None and state.shape[0] < B:
        raise ValueError(f"{op}: state has {state.shape[0]} slots, but without read_idx {B} rows need {B}")
    write_shapes = [[B], [B, T]] if per_token else [[B]]
    for name, index, shapes in (("read_idx", read_idx, [[B]]), ("write_idx", write_idx, write_shapes)):
        if index is not None:
            _check_index(op, name, index, shapes)


def _check_index(op: str, name: str, index: Tensor, shapes: list[list[int]]) -> None:
    if list(index.shape) not in shapes:
        _runtime.shape_error(op, name, index, " or ".join(str(s) for s in shapes))
    if index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: {name} has dtype {index.dtype}; supported: int32, int64")


def _check_pending(op: str, pending: PendingTokens | None, accepted: Tensor | None, like: Tensor) -> None:
    """Their shapes are checked by the operator, which knows those of the step."""
    if (pending is None) != (accepted is None):
        given, missing = ("accepted", "pending") if pending is None else ("pending", "accepted")
        raise ValueError(f"{op}: {given} is given, but {missing} is None; they belong together")
    if pending is None or accepted is None:
        return
    _runtime.check_tensors(op, like=like, pending_k=pending.k, pending_u=pending.u, pending_g=pending.g)
    _runtime.check_tensors(op, like=like, accepted=accepted)
    _check_index(op, "accepted", accepted, [[pending.k.shape[0]]])


def _check_backend(
    op: str, backend: str | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None,
    has_gradient: bool = True,
) -> None:  # fmt: skip
    if backend is not None:
        if backend not in BACKENDS:
            raise ValueError(f"{op}: backend is {backend!r}, expected one of {BACKENDS} or None")
        if not q.is_cuda:
            raise ValueError(f"{op}: backend is {backend!r}, but q is on {q.device}; supported there: None")
    elif q.is_cuda and type(q) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling():
        for backward in (False, True) if has_gradient and torch.is_grad_enabled() else (False,):
            _warn_once_if_slower(
                op, q.device, q.dtype, q.shape[3], v.shape[3], g is not None and g.dim() == 4, backward
            )


@functools.cache
def _warn_once_if_slower(
    op: str, device: torch.device, dtype: torch.dtype, K: int, V: int, channel_gate: bool, backward: bool
) -> None:
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return
    q, v = (torch.empty(1, 1, 1, d, dtype=dtype, device="meta") for d in (K, V))
    beta = torch.empty(1, 1, 1, dtype=dtype, device="meta")
    try:
        name, because = plan(q, q, v, beta, q if channel_gate else beta, 10 * major + minor, backward, None)
    except RuntimeError:  # no kernel: the call itself says so
        return
    if name == "portable":
        what = "gradient" if backward else "forward"
        _log.warning("%s: %s; the portable kernels run the %s instead", op, because, what)


def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    capability: int,
    backward: bool,
    backend: str | None,
) -> tuple[str, str]:
    """The backend of a call with these tensors (of the meta device), and why it is not hopper."""
    name, because = torch.ops.nearfield.delta_plan(q, k, v, beta, g, capability, backward, backend).split(
        "|", 1
    )
    return name, because


# Limits of the Hopper kernels that keep things for the gradient; K is padded to this.
_KEPT_K, _KEPT_V = 128, 256
_ROWS_BYTES, _IMAGE_BYTES = 7 * 4 * CHUNK, 2 * CHUNK * 64


def kept_bytes(
    q: Tensor, v: Tensor, g: Tensor | None, cu_seqlens: Tensor | None, backend: str | None
) -> int | torch.SymInt:
    """How many bytes ``delta_fwd_kept`` keeps for the gradient. The operator itself decides by the same rules."""
    B, T, _, K = q.shape
    HV, V = v.shape[2:]
    served = K % 8 == 0 and V % 8 == 0 and K <= _KEPT_K and V <= _KEPT_V
    if backend == "portable" or not served or not _keeps_on(q.device, q.dtype) or B == 0 or T == 0:
        return 0
    slots = B * ((T + CHUNK - 1) // CHUNK)
    if cu_seqlens is not None:
        if cu_seqlens.shape[0] == 1:
            return 0
        slots = T // CHUNK + cu_seqlens.shape[0] - 1
    values, keys = (V + 63) // 64, _KEPT_K // 64
    chunk = _ROWS_BYTES + (1 + values * (1 + keys)) * _IMAGE_BYTES
    if g is not None and g.dim() == 4:
        # Three tiles of keys, the decay of the chunk and the gates up to each row.
        chunk += 3 * keys * _IMAGE_BYTES + (1 + CHUNK) * 4 * _KEPT_K
    return slots * HV * chunk


@functools.cache
def _keeps_on(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or not torch.cuda.is_available():
        return False
    return _HAS_HOPPER and torch.cuda.get_device_capability(device) == (9, 0)


def _has_hopper() -> bool:
    q, beta = (
        torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((1, 1, 1, 128), (1, 1, 1))
    )
    try:
        return plan(q, q, q, beta, None, 90, True, None)[0] == "hopper"
    except RuntimeError:  # built without CUDA kernels
        return False


_HAS_HOPPER = _has_hopper()


def _flat(dt_bias: Tensor | None) -> Tensor | None:
    return None if dt_bias is None else dt_bias.reshape(-1)


def _check_inputs(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    **others: Tensor | None,
) -> None:
    """What holds before autocast: tensors, devices, dtypes, shapes of the token tensors."""
    _runtime.check_tensors(op, q=q, k=k, v=v, beta=beta, g=g, A_log=A_log, dt_bias=dt_bias, **others)
    if q.dim() != 4:
        _runtime.shape_error(op, "q", q, "[B, T, H, K]")
    B, T, H, K = q.shape
    if k.shape != q.shape:
        _runtime.shape_error(op, "k", k, f"{list(q.shape)} like q")
    if v.dim() != 4 or tuple(v.shape[:2]) != (B, T):
        _runtime.shape_error(op, "v", v, f"[{B}, {T}, HV, V]")
    HV, V = v.shape[2:]
    if H == 0 or HV == 0 or HV % H:
        raise ValueError(f"{op}: v has {HV} heads, expected a multiple of q's {H}")
    if K == 0 or V == 0:
        raise ValueError(f"{op}: q has {K} and v has {V} channels, expected at least 1 each")
    if tuple(beta.shape) != (B, T, HV):
        _runtime.shape_error(op, "beta", beta, f"[{B}, {T}, {HV}]")
    if g is not None and tuple(g.shape) not in ((B, T, HV), (B, T, HV, K)):
        _runtime.shape_error(op, "g", g, f"[{B}, {T}, {HV}] or [{B}, {T}, {HV}, {K}]")


def _check_options(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    beta_activation: str,
    gate: str,
    gate_bound: float,
) -> None:
    """What holds after autocast: dtypes, the named options and their parameters."""
    K, HV = q.shape[3], v.shape[2]
    _runtime.check_same_dtype(op, q=q, k=k, v=v)
    state_dtype = _state_dtype(q)
    for name, tensor in (("beta", beta), ("g", g), ("A_log", A_log), ("dt_bias", dt_bias)):
        if tensor is not None and tensor.dtype not in (q.dtype, state_dtype):
            supported = ", ".join(map(str, dict.fromkeys((q.dtype, state_dtype))))
            raise ValueError(
                f"{op}: {name} has dtype {tensor.dtype}; supported with q in {q.dtype}: {supported}"
            )
    if beta_activation not in BETA_ACTIVATIONS:
        supported = ", ".join(BETA_ACTIVATIONS)
        raise ValueError(f"{op}: beta_activation is {beta_activation!r}; supported: {supported}")
    if gate not in GATES:
        raise ValueError(f"{op}: gate is {gate!r}; supported: {', '.join(GATES)}")
    if gate == "log" and (A_log is not None or dt_bias is not None):
        raise ValueError(f"{op}: A_log and dt_bias belong to gate 'softplus' or 'bounded', but gate is 'log'")
    if gate != "log" and g is None:
        raise ValueError(f"{op}: gate is {gate!r}, but g is None")
    if gate == "softplus" and A_log is None:
        raise ValueError(f"{op}: gate is 'softplus', which needs A_log, but A_log is None")
    if gate == "bounded" and not -5 <= gate_bound < 0:
        raise ValueError(f"{op}: gate_bound is {gate_bound}, expected a number in [-5, 0)")
    if A_log is not None and tuple(A_log.shape) != (HV,):
        _runtime.shape_error(op, "A_log", A_log, f"[{HV}]")
    if dt_bias is not None and g is not None:
        expected = [(HV,)] if g.dim() == 3 else [(HV, K), (HV * K,)]
        if tuple(dt_bias.shape) not in expected:
            _runtime.shape_error(op, "dt_bias", dt_bias, " or ".join(str(list(e)) for e in expected))


def _state_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _check_state(
    op: str,
    name: str,
    state: Tensor,
    q: Tensor,
    shape: list[int | None],
    v_first: bool,
    also: torch.dtype | None = None,
) -> None:
    """``shape`` is [N, HV, K, V]; None accepts any size."""
    slots, HV, K, V = shape
    expected = [slots, HV, V, K] if v_first else [slots, HV, K, V]
    if state.dim() != 4 or any(e is not None and e != s for e, s in zip(expected, state.shape, strict=True)):
        text = ", ".join("P" if e is None else str(e) for e in expected)
        _runtime.shape_error(op, name, state, f"[{text}]")
    supported = [_state_dtype(q)]
    if also is not None and q.dtype != torch.float64:
        supported.append(also)
    if state.dtype not in supported:
        text = ", ".join(map(str, supported))
        raise ValueError(f"{op}: {name} has dtype {state.dtype}; supported with q in {q.dtype}: {text}")


# ---------------------------------------------------------------------------------------------- fake kernels


def _fake_forward(
    q: Tensor, v: Tensor, cu_seqlens: Tensor | None, state_v_first: bool, output_final_state: bool
) -> tuple[Tensor, Tensor]:
    K, (HV, V) = q.shape[3], v.shape[2:]
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = [sequences, HV, V, K] if state_v_first else [sequences, HV, K, V]
    return q.new_empty(v.shape), q.new_empty(shape if output_final_state else [0], dtype=_state_dtype(q))


@torch.library.register_fake("nearfield::delta_fwd")  # type: ignore[untyped-decorator]
def _(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial_state: Tensor | None,
    A_log: Tensor | None, dt_bias: Tensor | None, cu_seqlens: Tensor | None, scale: float, qk_l2norm: bool,
    beta_activation: int, gate: int, gate_bound: float, state_v_first: bool, output_final_state: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _fake_forward(q, v, cu_seqlens, state_v_first, output_final_state)


@torch.library.register_fake("nearfield::delta_fwd_kept")  # type: ignore[untyped-decorator]
def _(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial_state: Tensor | None,
    A_log: Tensor | None, dt_bias: Tensor | None, cu_seqlens: Tensor | None, scale: float, qk_l2norm: bool,
    beta_activation: int, gate: int, gate_bound: float, state_v_first: bool, output_final_state: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kept = q.new_empty([kept_bytes(q, v, g, cu_seqlens, backend)], dtype=torch.uint8)
    return (*_fake_forward(q, v, cu_seqlens, state_v_first, output_final_state), kept)


@torch.library.register_fake("nearfield::delta_fwd_states")  # type: ignore[untyped-decorator]
def _(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial_state: Tensor | None,
    A_log: Tensor | None, dt_bias: Tensor | None, cu_seqlens: Tensor | None, scale: float, qk_l2norm: bool,
    beta_activation: int, gate: int, gate_bound: float, state_v_first: bool, output_final_state: bool,
    states_every: int, backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (B, T, _, K), (HV, V) = q.shape, v.shape[2:]
    state = [HV, V, K] if state_v_first else [HV, K, V]
    shape = [B, T // (CHUNK * states_every), *state] if states_every else [0]
    states = q.new_empty(shape, dtype=_state_dtype(q))
    return (*_fake_forward(q, v, cu_seqlens, state_v_first, output_final_state), states)


@torch.library.register_fake("nearfield::delta_bwd")  # type: ignore[untyped-decorator]
def _(
    d_o: Tensor | None, d_final: Tensor | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor,
    g: Tensor | None, initial_state: Tensor | None, A_log: Tensor | None, dt_bias: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, qk_l2norm: bool, beta_activation: int, gate: int,
    gate_bound: float, state_v_first: bool, backend: str | None = None, kept: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    def like(t: Tensor | None) -> Tensor:
        return q.new_empty(0, dtype=_state_dtype(q)) if t is None else t.new_empty(t.shape)

    return tuple(map(like, (q, k, v, beta, g, initial_state, A_log, dt_bias)))


@torch.library.register_fake("nearfield::delta_step")  # type: ignore[untyped-decorator]
def _(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, read_idx: Tensor | None,
    write_idx: Tensor | None, A_log: Tensor | None, dt_bias: Tensor | None, scale: float, qk_l2norm: bool,
    beta_activation: int, gate: int, gate_bound: float, state_v_first: bool,
) -> Tensor:  # fmt: skip
    return q.new_empty(v.shape)


@torch.library.register_fake("nearfield::delta_verify")  # type: ignore[untyped-decorator]
def _(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    wide = _state_dtype(q)
    gates = 0 if g is None else 1 if g.dim() == 3 else g.shape[3]
    k_, u = q.new_empty(k.shape, dtype=wide), q.new_empty(v.shape, dtype=wide)
    return q.new_empty(v.shape), k_, u, q.new_empty([*v.shape[:3], gates], dtype=wide)


@torch.library.register_fake("nearfield::delta_commit")  # type: ignore[untyped-decorator]
def _(*arguments: Any) -> None:
    return None


# ------------------------------------------------------------------------------------------------- autograd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    kept = output[2] if len(output) == 3 else None
    ctx.save_for_backward(*inputs[:9], kept)
    ctx.options = inputs[9:15]
    ctx.backend = inputs[16]


def _backward(
    ctx: Any, d_o: Tensor | None, d_final: Tensor | None, d_kept: None = None
) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    if d_o is None and (d_final is None or d_final.dim() == 1):
        return (None,) * len(needed)
    if d_final is not None and d_final.dim() == 1:  # of the placeholder without output_final_state
        d_final = None
    *inputs, kept = ctx.saved_tensors
    grads = _gradient(d_o, d_final, *inputs, *ctx.options, ctx.backend, kept)
    wanted = [grad if need else None for grad, need in zip(grads, needed, strict=False)]
    return (*wanted, *(None,) * (len(needed) - len(wanted)))


_forward = _runtime.differentiable("delta_fwd", _backward, _setup_context)
_forward_kept = _runtime.differentiable("delta_fwd_kept", _backward, _setup_context)


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> NoReturn:
    raise NotImplementedError(
        "delta_rule: has no second derivative; do not backpropagate through its gradient"
    )


_gradient = _runtime.differentiable("delta_bwd", _no_second_derivative)
