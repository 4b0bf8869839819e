"""Local linear attention: public functions, fake kernels, autograd. The mathematics: csrc/lla/README.md."""

from __future__ import annotations

import functools
import logging
import math
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from nearfield import _runtime

Ridge = Literal["relative", "absolute"]

_DEVICES = _runtime.devices_with_kernel("lla_fwd")
_STEP_DEVICES = _runtime.devices_with_kernel("lla_step")
_BACKENDS = ("hopper", "portable")
_log = logging.getLogger("nearfield")


class SolveInfo(NamedTuple):
    """What the solver did, one value per query and head: [B, m, Hq], not differentiable."""

    lse: Tensor
    """log sum_j exp(s_ij); -inf for a query without keys."""
    iterations: Tensor
    """Conjugate gradient steps taken, int32."""
    ratio: Tensor
    """The stopping quotient at the last step, float32. Above ``tol``: the row had not converged."""


@overload
def local_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, lam: float | Tensor, scale: float | None = ..., is_causal: bool = ...,
    tol: float = ..., max_iters: int = ..., window: int | None = ..., ridge: Ridge = ...,
    return_aux: Literal[False] = ..., backend: str | None = ..., cu_seqlens: Tensor | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def local_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, lam: float | Tensor, scale: float | None = ..., is_causal: bool = ...,
    tol: float = ..., max_iters: int = ..., window: int | None = ..., ridge: Ridge = ...,
    return_aux: Literal[True], backend: str | None = ..., cu_seqlens: Tensor | None = ...,
) -> tuple[Tensor, SolveInfo]: ...  # fmt: skip
def local_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lam: float | Tensor,
    scale: float | None = None,
    is_causal: bool = True,
    tol: float = 1e-3,
    max_iters: int = 16,
    window: int | None = None,
    ridge: Ridge = "relative",
    return_aux: bool = False,
    backend: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, SolveInfo]:
    """Fits an affine map to the visible (key, value) pairs of every query and returns its value at the query.

    With p = softmax(scale q.k) over the visible keys, kbar = sum p k and C the p-weighted covariance of the
    keys: x = (C + lam I)^-1 (q - kbar) and o = sum_j p_j (1 + (k_j - kbar).x) v_j. As lam grows, x vanishes
    and softmax attention remains.

    Args:
        q: queries [B, m, Hq, d].
        k: keys [B, n, Hk, d]; Hq is a multiple of Hk (grouped-query attention).
        v: values [B, n, Hk, dv].
        lam: positive ridge in units of |k|^2. A float, or a tensor (differentiable, values not checked) whose
            number of dimensions says what it is: scalar [], per head [Hq], per head and channel [Hq, d], per
            head and token [B, m, Hq].
        scale: kernel bandwidth, d^-1/2 by default.
        is_causal: query i sees keys j <= i + n - m, so that the last query sees every key.
        tol: a row stops when its estimated error is at most tol, in units of the spread of the values under
            p times sqrt(1 + x.A.x). 0: max_iters steps, unless the residual vanishes before.
        max_iters: most conjugate gradient steps of a row, in the forward and in the backward.
        window: number of keys a query sees. Causal: the last ``window`` keys up to its position. Otherwise:
            that many keys around its position (one more on the left if even), shifted inwards at both ends of
            the sequence, so that there are always min(window, n).
        ridge: "relative" adds lam to the covariance. "absolute" adds it to the sums before normalisation,
            sum_j exp(s_j) (k_j - kbar)(k_j - kbar)^T: the relative ridge is then lam exp(-lse).
        return_aux: also return a ``SolveInfo``.
        backend: CUDA only. ``"hopper"``: the kernels for compute capability 9.0 (bfloat16 and float16, head dims that
            are multiples of 8 up to 128). ``"portable"``: those for every GPU since Ampere (also float32, any head
            dim up to 128). None: hopper where it serves the call, else portable; where that leaves the GPU's own
            kernels aside, the logger ``nearfield`` warns once per reason.
        cu_seqlens: packed sequences, B = 1 and m = n: int32 or int64 [N + 1], on q's device. Sequence s is
            tokens cu_seqlens[s] to cu_seqlens[s + 1]; it starts with 0 and does not decrease, which is checked
            on the CPU only. Each sequence sees itself, as in a call of its own; what the tokens behind the
            last hold (NaN, too) is not used, and they get 0.

    Returns:
        o [B, m, Hq, dv]; a query without visible keys gets 0. The gradient is that of the exact solution,
        evaluated at the computed one (a second solve with the same tol, relative to its own solution).
    """
    op = "local_linear_attention"
    scale = _check(op, q, k, v, scale, window)
    _check_packing(op, cu_seqlens, q, k)
    o, info = _solve_and_read(
        op, q, k, v, cu_seqlens, lam, scale, is_causal, window, ridge, tol, max_iters, backend, []
    )
    return (o, info) if return_aux else o


def _solve_and_read(
    op: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, lam: float | Tensor, scale: float, is_causal: bool,
    window: int | None, ridge: str, tol: float, max_iters: int, backend: str | None, grid: list[int],
) -> tuple[Tensor, SolveInfo]:  # fmt: skip
    """Checks what is left to check and runs the operator."""
    _runtime.check_device(op, q, _DEVICES)
    _check_backend(op, backend, q, v)
    if not isinstance(tol, (int, float)) or not 0 <= tol < math.inf:
        raise ValueError(f"{op}: tol is {tol}, expected a finite number >= 0")
    if not isinstance(max_iters, int) or max_iters < 1:
        raise ValueError(f"{op}: max_iters is {max_iters}, expected an integer >= 1")
    rows = _ridge_rows(op, lam, q, ridge)
    q, k, v = _runtime.autocast(q, k, v)
    o, _, _, lse, iterations, ratio = _solve(
        q,
        k,
        v,
        rows.to(_statistics_dtype(q)),
        cu_seqlens,
        scale,
        is_causal,
        window,
        ridge == "absolute",
        float(tol),
        max_iters,
        backend,
        grid,
    )
    return o, SolveInfo(lse.detach(), iterations, ratio.detach())


def probe_attention(
    q: Tensor,
    x: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = True,
    window: int | None = None,
    backend: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Local linear attention with the slope given: o_i = sum_j p_ij (1 + (k_j - kbar_i).x_i) v_j.

    x [B, m, Hq, d] has the shape of q and any floating dtype, and is used in float32 (or in q's float64).
    The other arguments are those of ``local_linear_attention``. Differentiable in q, x, k and v.
    """
    op = "probe_attention"
    scale = _check(op, q, k, v, scale, window)
    _check_packing(op, cu_seqlens, q, k)
    _check_probe(op, q, x)
    return _read(op, q, x, k, v, cu_seqlens, scale, is_causal, window, backend, [])


def _check_probe(op: str, q: Tensor, x: Tensor) -> None:
    _runtime.check_tensors(op, q=q, x=x)
    if not x.is_floating_point():
        raise NotImplementedError(f"{op}: x has dtype {x.dtype}; supported: floating point")
    if x.shape != q.shape:
        _runtime.shape_error(op, "x", x, f"the shape of q, {list(q.shape)}")


def _read(
    op: str, q: Tensor, x: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, scale: float, is_causal: bool,
    window: int | None, backend: str | None, grid: list[int],
) -> Tensor:  # fmt: skip
    _runtime.check_device(op, q, _DEVICES)
    _check_backend(op, backend, q, v)
    q, k, v = _runtime.autocast(q, k, v)
    if x.dtype != q.dtype:
        x = x.to(_statistics_dtype(q))
    o: Tensor = _probe(q, x, k, v, cu_seqlens, scale, is_causal, window, backend, grid)[0]
    return o


def local_linear_attention_step(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    lam: float | Tensor,
    cache_seqlens: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    ridge: Ridge = "relative",
) -> Tensor:
    """Decoding: a few queries per sequence against a cache of keys and values, solved directly. No gradient.

    Args:
        q: queries [B, m, Hq, d], the last m tokens of each sequence.
        k_cache: keys [B, N, Hk, d]; those of the m new tokens are already in it.
        v_cache: values [B, N, Hk, dv].
        lam: as in ``local_linear_attention``. A ridge below the precision of the covariance gives NaN.
        cache_seqlens: integers [B], the filled length of each sequence, new tokens included; N by default.
            What lies behind is not read.
        scale, window, ridge: as in ``local_linear_attention``, which with is_causal gives the same result.

    Returns:
        o [B, m, Hq, dv].
    """
    op = "local_linear_attention_step"
    scale = _check(op, q, k_cache, v_cache, scale, window, keys="k_cache", values="v_cache")
    _runtime.check_device(op, q, _STEP_DEVICES)
    differentiable = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "lam": lam}
    for name, tensor in differentiable.items():
        if torch.is_grad_enabled() and isinstance(tensor, Tensor) and tensor.requires_grad:
            raise ValueError(
                f"{op}: {name} requires grad, but decoding has no gradient; call it under torch.no_grad()"
            )
    if cache_seqlens is not None:
        _runtime.check_tensors(op, q=q, cache_seqlens=cache_seqlens)
        if cache_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{op}: cache_seqlens has dtype {cache_seqlens.dtype}, expected int32 or int64")
        if cache_seqlens.shape != q.shape[:1]:
            _runtime.shape_error(
                op, "cache_seqlens", cache_seqlens, f"[{q.shape[0]}], one length per sequence"
            )
    rows = _ridge_rows(op, lam, q, ridge)
    q, k_cache, v_cache = _runtime.autocast(q, k_cache, v_cache)
    o: Tensor = torch.ops.nearfield.lla_step(
        q,
        k_cache,
        v_cache,
        cache_seqlens,
        rows.to(_statistics_dtype(q)),
        scale,
        window,
        ridge == "absolute",
    )
    return o


def _statistics_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _check(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    window: int | None,
    keys: str = "k",
    values: str = "v",
) -> float:
    """What all three functions ask of their inputs. Returns the scale."""
    tensors: dict[str, Tensor | None] = {"q": q, keys: k, values: v}
    _runtime.check_tensors(op, **tensors)
    _runtime.check_same_dtype(op, supported=_runtime.FLOAT_DTYPES, **tensors)
    if q.ndim != 4 or q.shape[-1] < 1:
        _runtime.shape_error(op, "q", q, "[B, m, Hq, d] with d >= 1")
    batch, _, heads, d = q.shape
    if k.ndim != 4 or k.shape[0] != batch or k.shape[3] != d:
        _runtime.shape_error(op, keys, k, f"[{batch}, n, Hk, {d}] as q has {list(q.shape)}")
    if v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        expected = f"[{batch}, {k.shape[1]}, {k.shape[2]}, dv] as {keys} has {list(k.shape)}"
        _runtime.shape_error(op, values, v, expected)
    kv_heads = k.shape[2]
    if (heads % kv_heads if kv_heads else heads) != 0:
        raise ValueError(
            f"{op}: q has {heads} heads, expected a multiple of the {kv_heads} heads of {keys} and {values}"
        )
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"{op}: window is {window}, expected None or an integer >= 1")
    if scale is None:
        return float(d**-0.5)
    if not isinstance(scale, (int, float)):
        raise TypeError(f"{op}: scale must be a float, got {type(scale).__name__}")
    if not -math.inf < scale < math.inf:  # not math.isfinite: torch.compile may pass a symbolic float
        raise ValueError(f"{op}: scale is {scale}, expected a finite number")
    return float(scale)


def _check_packing(op: str, cu_seqlens: Tensor | None, q: Tensor, k: Tensor) -> None:
    if cu_seqlens is None:
        return
    _runtime.check_tensors(op, q=q, cu_seqlens=cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: cu_seqlens has dtype {cu_seqlens.dtype}, expected int32 or int64")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        _runtime.shape_error(op, "cu_seqlens", cu_seqlens, "[N + 1], the boundaries of N sequences")
    if q.shape[0] != 1:
        raise ValueError(f"{op}: cu_seqlens needs a batch of 1, got {q.shape[0]}")
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"{op}: cu_seqlens needs as many keys as queries, got {k.shape[1]} and {q.shape[1]}")


def _check_backend(op: str, backend: str | None, q: Tensor, v: Tensor) -> None:
    if backend is not None:
        if backend not in _BACKENDS:
            raise ValueError(f"{op}: backend is {backend!r}, expected one of {_BACKENDS} or None")
        if not q.is_cuda:
            raise ValueError(f"{op}: backend is {backend!r}, but q is on {q.device}; supported there: None")
    elif q.is_cuda and type(q) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling():
        _warn_once_if_slower(op, q.device, _runtime.autocast(q)[0].dtype, q.shape[-1], v.shape[-1])


@functools.cache
def _warn_once_if_slower(op: str, device: torch.device, dtype: torch.dtype, d: int, dv: int) -> None:
    major, minor = torch.cuda.get_device_capability(device)
    if reason := torch.ops.nearfield.lla_slower_because(10 * major + minor, dtype, d, dv):
        _log.warning("%s: %s; the portable kernels run instead", op, reason)


def _ridge_rows(op: str, lam: float | Tensor, q: Tensor, ridge: str) -> Tensor:
    """lam as a view [B, m, Hq, 1] or, per channel, [B, m, Hq, d]; autograd of the view sums its gradient."""
    if ridge not in ("relative", "absolute"):
        raise ValueError(f"{op}: ridge is {ridge!r}, expected 'relative' or 'absolute'")
    batch, m, heads, d = q.shape
    if not isinstance(lam, Tensor):
        if not isinstance(lam, (int, float)):
            raise TypeError(f"{op}: lam must be a float or a torch.Tensor, got {type(lam).__name__}")
        if not 0 < lam < math.inf:
            raise ValueError(f"{op}: lam is {lam}, expected a finite number > 0")
        lam = torch.full((), lam, dtype=_statistics_dtype(q), device=q.device)
    _runtime.check_tensors(op, q=q, lam=lam)
    if not lam.is_floating_point():
        raise NotImplementedError(f"{op}: lam has dtype {lam.dtype}; supported: floating point")
    if lam.ndim == 0:
        lam = lam[None, None, None, None]
    elif lam.shape == (heads,):
        lam = lam[None, None, :, None]
    elif lam.shape == (heads, d):
        lam = lam[None, None]
    elif lam.shape == (batch, m, heads):
        lam = lam[..., None]
    else:
        expected = f"[], [{heads}] per head, [{heads}, {d}] per channel or [{batch}, {m}, {heads}] per token"
        _runtime.shape_error(op, "lam", lam, expected)
    return lam.expand(batch, m, heads, lam.shape[-1])


# --- fake kernels ----------------------------------------------------------------------------------------


def _fwd_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    statistics = _statistics_dtype(q)
    o, x, kbar = (
        q.new_empty([*q.shape[:3], v.shape[3]]),
        *(q.new_empty(q.shape, dtype=statistics) for _ in range(2)),
    )
    lse = q.new_empty(q.shape[:3], dtype=statistics)
    return (
        o,
        x,
        kbar,
        lse,
        q.new_empty(lse.shape, dtype=torch.int32),
        q.new_empty(lse.shape, dtype=torch.float32),
    )


def _bwd_fake(d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, lam: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), lam.new_empty(lam.shape)


def _probe_fwd_fake(q: Tensor, x: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    statistics = _statistics_dtype(q)
    o = q.new_empty([*q.shape[:3], v.shape[3]])
    return o, q.new_empty(q.shape, dtype=statistics), q.new_empty(q.shape[:3], dtype=statistics)


def _probe_bwd_fake(d_o: Tensor, q: Tensor, x: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), x.new_empty(x.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _step_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty([*q.shape[:3], v.shape[3]])


torch.library.register_fake("nearfield::lla_fwd", _fwd_fake)
torch.library.register_fake("nearfield::lla_bwd", _bwd_fake)
torch.library.register_fake("nearfield::lla_probe_fwd", _probe_fwd_fake)
torch.library.register_fake("nearfield::lla_probe_bwd", _probe_bwd_fake)
torch.library.register_fake("nearfield::lla_step", _step_fake)


# --- autograd --------------------------------------------------------------------------------------------
# Only o is differentiable. The op's other outputs are statistics that the public functions detach.


def _fwd_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, lam, cu_seqlens, *ctx.options = inputs
    _, x, kbar, lse, iterations, ratio = output
    ctx.mark_non_differentiable(x, kbar, lse, iterations, ratio)
    ctx.set_materialize_grads(False)  # five kernels that fill zeros for the statistics
    ctx.save_for_backward(q, k, v, lam, x, kbar, lse, cu_seqlens)


def _fwd_backward(ctx: Any, d_o: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if d_o is None:
        return (None,) * len(ctx.needs_input_grad)
    grads = _solve_gradient(d_o, *ctx.saved_tensors, *ctx.options)
    return (*grads, None, *(None for _ in ctx.options))


def _probe_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, x, k, v, cu_seqlens, *ctx.options = inputs
    _, kbar, lse = output
    ctx.mark_non_differentiable(kbar, lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, x, k, v, kbar, lse, cu_seqlens)


def _probe_backward(ctx: Any, d_o: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if d_o is None:
        return (None,) * len(ctx.needs_input_grad)
    grads = _probe_gradient(d_o, *ctx.saved_tensors, *ctx.options)
    return (*grads, None, *(None for _ in ctx.options))


_solve = _runtime.differentiable("lla_fwd", _fwd_backward, _fwd_save)
_probe = _runtime.differentiable("lla_probe_fwd", _probe_backward, _probe_save)


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError(
        "local_linear_attention: second derivatives are not implemented; supported: first derivatives"
    )


# Without a rule, torch would treat the gradients as constants and only warn.
_solve_gradient = _runtime.differentiable("lla_bwd", _no_second_derivative)
_probe_gradient = _runtime.differentiable("lla_probe_bwd", _no_second_derivative)
