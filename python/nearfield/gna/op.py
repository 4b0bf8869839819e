"""Neighborhood attention: public functions, fake kernels, autograd rule. Kernels are in ``csrc/gna``."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nearfield import _runtime
from nearfield.gna import fp8

_OP = "neighborhood_attention"
_DEVICES = _runtime.devices_with_kernel("gna_fwd")
_BACKENDS = ("hopper", "portable")
_log = logging.getLogger("nearfield")


def neighborhood_attention(
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
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every position of a 1-, 2- or 3-dimensional grid to the window of positions around it.

    Per dimension, a query sees ``kernel_size`` keys, ``dilation`` apart, as centred as the border allows (at
    the border the window is shifted, not cut). ``stride`` consecutive queries share one window. In a causal
    dimension the window ends at the query itself and is cut at the border. The neighborhood is the product of
    these sets over the dimensions.

    The four window parameters may differ from head to head: ``H`` tuples with one value per dimension instead of one
    tuple, for instance ``kernel_size=((7, 7), (7, 7), (31, 31))``. Query heads that share a head of k and v share
    their windows. Heads with the same windows, evenly spaced, are one launch on a GPU; nothing is copied.

    Args:
        q: ``[B, *X, H, D]``, with ``X`` of 1, 2 or 3 spatial dimensions.
        k: ``[B, *X, Hkv, D]``; ``H`` a multiple of ``Hkv``; consecutive query heads share a head of k and v.
        v: ``[B, *X, Hkv, Dv]``.
        kernel_size: one value, or one per dimension; -1 or None: the largest that fits, ``X // dilation``.
        stride: at most ``kernel_size``; one value, or one per dimension.
        dilation: ``kernel_size * dilation`` is at most ``X``; one value, or one per dimension.
        is_causal: one bool, or one per dimension.
        scale: factor of the scores; None: ``D ** -0.5``.
        additional_keys: ``[B, M, Hkv, D]``, further tokens that every query sees (text, registers).
        additional_values: ``[B, M, Hkv, Dv]``.
        bias: added to the scaled scores, by relative position: ``[H, 2 w - 1, ..]`` with one such dimension per spatial
            dimension and its ``kernel_size`` w; entry ``key - query + w - 1``, in steps of the dilation. In the dtype of q
            or float32 (for float64: float64), it is used in float32. All heads then have one ``kernel_size``.
            Its gradient is summed in a fixed order.
        periodic: one bool, or one per dimension: the dimension is a circle, on which every window is centred on its stride
            group and goes on at the other end. Not in a causal dimension, ``X`` a multiple of the dilation there, all heads
            with the same windows. Computed on a grid that is up to ``kernel_size * dilation`` longer in that dimension, with
            copies of q, k and v.
        return_lse: also return the natural logarithm of the softmax's denominator, which is differentiable.
        backend: CUDA only. ``"hopper"``: the kernels for compute capability 9.0 (bfloat16 and float16, head dims that
            are multiples of 8); ``"portable"``: those for every GPU since Ampere (float32 too, any head dim up to 256,
            always deterministic); None: hopper where it serves the problem, else portable. Where that leaves a Hopper
            GPU's own kernels aside, the logger ``nearfield`` warns once per reason.

        q_descale: for q, k and v in ``torch.float8_e4m3fn``: float32 ``[B, Hkv]``, positive; what q stands for is q times
            this (all query heads of a head of k share it); None: 1. 8-bit inputs have a forward only, on the CPU and, with
            head dims that are multiples of 16 up to 128, on Hopper; no bias, no additional tokens, no periodic borders.
            The numerators of the softmax are rounded to ``float8_e4m3fn`` as well before they meet v (not on the CPU).
        k_descale: the same for k.
        v_descale: the same for v.
        out_dtype: of the output for 8-bit inputs: bfloat16, which is the default, or float16.

    Raises:
        RuntimeError: the GPU, the dtype or the head dims are not supported (by the backend asked for).

    Returns:
        ``out [B, *X, H, Dv]``, or ``(out, lse)`` with ``lse [B, *X, H]`` in float32 (for float64: float64).
    """
    _runtime.check_tensors(
        _OP, q=q, k=k, v=v, additional_keys=additional_keys, additional_values=additional_values, bias=bias,
        q_descale=q_descale, k_descale=k_descale, v_descale=v_descale,
    )  # fmt: skip
    if additional_keys is None or additional_values is None:
        if additional_keys is not None or additional_values is not None:
            given, missing = ("keys", "values") if additional_values is None else ("values", "keys")
            raise ValueError(
                f"{_OP}: additional_{given} is given without additional_{missing}; give both or neither"
            )
        q, k, v = _runtime.autocast(q, k, v)
    else:
        q, k, v, additional_keys, additional_values = _runtime.autocast(
            q, k, v, additional_keys, additional_values
        )
    _runtime.check_device(_OP, q, _DEVICES)
    window, strides, dilations, causal = check_arguments(
        q, k, v, additional_keys, additional_values, kernel_size, stride, dilation, is_causal
    )
    factor = _scale(scale, q)
    descales = {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
    if q.dtype == fp8.DTYPE:
        _check_backend(backend, q)
        out, lse = fp8.forward(
            _OP, q, k, v, (window, strides, dilations, causal), factor, descales, out_dtype, bias=bias,
            additional_keys=additional_keys, periodic=any(_per_dimension("periodic", periodic, q.dim() - 3)),
            backend=None if backend == "hopper" else backend,
        )  # fmt: skip
        return (out, lse) if return_lse else out
    fp8.check_absent(_OP, q, **descales, out_dtype=out_dtype)
    bias = check_bias(bias, q, window)
    if factor <= 0 and q.is_cuda:
        # The CUDA kernels take a row's maximum before they scale, which needs a positive scale.
        q, factor = (-q, -factor) if factor < 0 else (q * 0, 1.0)
    _check_backend(backend, q)
    if (
        backend is None
        and q.is_cuda
        and type(q) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
    ):
        _warn_once_if_slower(q.device, q.dtype, q.shape[-1], v.shape[-1])
    halos = periodic_halos(periodic, q, window, strides, dilations, causal, bias is not None)
    size = q.shape[1:-2]
    q, k, v = with_halos(q, k, v, halos)
    out, lse = _attend(
        q, k, v, additional_keys, additional_values, window, strides, dilations, causal, factor, backend, bias
    )
    for i, (left, right) in enumerate(halos):
        if left + right > 0:
            out, lse = (t.narrow(i + 1, left, size[i]) for t in (out, lse))
    return (out, lse) if return_lse else out


def merge_attentions(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Joins attention of the same queries over disjoint sets of keys, as if it had been computed at once.

    Args:
        outputs: one ``[..., H, Dv]`` per set of keys.
        lses: one ``[..., H]`` per set of keys; -inf where a set is empty.

    Returns:
        ``(out, lse)``: ``out`` in the dtype of the first output, ``lse`` in float32, for float64 in float64.
    """
    op = "merge_attentions"
    if len(outputs) == 0 or len(outputs) != len(lses):
        raise ValueError(
            f"{op}: got {len(outputs)} outputs and {len(lses)} lses, expected as many, at least one"
        )
    for i, (out, lse) in enumerate(zip(outputs, lses, strict=True)):
        _runtime.check_tensors(op, **{"outputs[0]": outputs[0], f"outputs[{i}]": out, f"lses[{i}]": lse})
        if out.shape != outputs[0].shape:
            _runtime.shape_error(op, f"outputs[{i}]", out, f"{list(outputs[0].shape)} as outputs[0]")
        if lse.shape != out.shape[:-1]:
            _runtime.shape_error(
                op, f"lses[{i}]", lse, f"{list(out.shape[:-1])}, that of outputs[{i}] without features"
            )
    dtype = torch.float64 if outputs[0].dtype == torch.float64 else torch.float32
    parts = torch.stack([lse.to(dtype) for lse in lses])
    lse = parts.logsumexp(0)
    weights = (parts - lse).exp()
    out = weights[0][..., None] * outputs[0].to(dtype)
    for weight, part in zip(weights[1:], outputs[1:], strict=True):
        out = out + weight[..., None] * part.to(dtype)
    return out.to(outputs[0].dtype), lse


def _check_backend(backend: str | None, q: Tensor) -> None:
    if backend is None:
        return
    if backend not in _BACKENDS:
        raise ValueError(f"{_OP}: backend is {backend!r}, expected one of {_BACKENDS} or None")
    if not q.is_cuda:
        raise ValueError(f"{_OP}: backend is {backend!r}, but q is on {q.device}; supported there: None")


@functools.cache
def _warn_once_if_slower(device: torch.device, dtype: torch.dtype, dim: int, dim_v: int) -> None:
    major, minor = torch.cuda.get_device_capability(device)
    if reason := torch.ops.nearfield.gna_slower_because(10 * major + minor, dtype, dim, dim_v):
        _log.warning("%s: %s; the portable kernels run instead", _OP, reason)


def check_arguments(
    q: Tensor, k: Tensor, v: Tensor, additional_k: Tensor | None, additional_v: Tensor | None,
    kernel_size: object, stride: object, dilation: object, is_causal: object,
) -> tuple[list[int], list[int], list[int], list[int]]:  # fmt: skip
    """The window parameters as the operators want them, once everything fits together."""
    _runtime.check_same_dtype(
        _OP, supported=(*_runtime.FLOAT_DTYPES, fp8.DTYPE), q=q, k=k, v=v, additional_keys=additional_k,
        additional_values=additional_v,
    )  # fmt: skip
    _check_shapes(q, k, v, additional_k, additional_v)
    heads, heads_kv = q.shape[-2], k.shape[-2]
    return _window_parameters(tuple(q.shape[1:-2]), heads, heads_kv, kernel_size, stride, dilation, is_causal)


def check_bias(bias: Tensor | None, q: Tensor, window: list[int]) -> Tensor | None:
    """The bias as the operators want it: checked, in the dtype of the statistics."""
    if bias is None:
        return None
    n, wide = q.dim() - 3, torch.float64 if q.dtype == torch.float64 else torch.float32
    if bias.dtype not in (q.dtype, wide):
        names = " or ".join(sorted({str(dtype).removeprefix("torch.") for dtype in (q.dtype, wide)}))
        raise ValueError(f"{_OP}: bias has dtype {bias.dtype}, expected {names}")
    if any(w != window[i % n] for i, w in enumerate(window)):
        raise ValueError(f"{_OP}: bias is given with kernel_size {window}, expected the same in all heads")
    if tuple(bias.shape) != (want := (q.shape[-2], *(2 * w - 1 for w in window[:n]))):
        _runtime.shape_error(
            _OP, "bias", bias, f"{list(want)}: heads, then 2 * kernel_size - 1 per dimension"
        )
    return bias.to(wide)


def periodic_halos(
    periodic: object, q: Tensor, window: list[int], stride: list[int], dilation: list[int], causal: list[int],
    biased: bool,
) -> list[tuple[int, int]]:  # fmt: skip
    """How far the windows reach beyond either end of each dimension; (0, 0) where it is not periodic."""
    size = q.shape[1:-2]
    n = len(size)
    wanted = _per_dimension("periodic", periodic, n)
    for p in wanted:
        if not isinstance(p, bool):
            raise TypeError(f"{_OP}: periodic must be a bool or one bool per dimension, got {periodic!r}")
    halos = []
    for i, (w, s, d) in enumerate(zip(window[:n], stride[:n], dilation[:n], strict=True)):
        if not wanted[i]:
            halos.append((0, 0))
            continue
        for name, values in (("kernel_size", window), ("stride", stride), ("dilation", dilation)):
            if any(value != values[i] for value in values[i::n]):
                raise ValueError(
                    f"{_OP}: periodic is {periodic!r} with {name} {values[i::n]} in dimension {i}, expected the"
                    " same in all heads"
                )
        if any(causal[i::n]):
            raise ValueError(f"{_OP}: dimension {i} is periodic and causal, expected at most one of them")
        if size[i] % d != 0:
            raise ValueError(
                f"{_OP}: periodic is {periodic!r}, but size {size[i]} of dimension {i} is not a multiple of"
                f" dilation {d}"
            )
        length = size[i] // d
        if w == length and not biased:  # every query sees the whole circle anyway
            halos.append((0, 0))
            continue
        # Indices inside a dilation group. The first stride group's window begins at s // 2 - w // 2; the halo must not
        # shift the stride groups.
        left = -(-max(0, w // 2 - s // 2) // s) * s
        right = max(0, (length - 1) // s * s + s // 2 - w // 2 + w - length)
        halos.append((left * d, right * d))
    return halos


def with_halos(
    q: Tensor, k: Tensor, v: Tensor, halos: list[tuple[int, int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """The grid with each dimension's ends beyond the other end; there are no queries there, so zeros."""
    if not any(left + right for left, right in halos):
        return q, k, v
    q = torch.nn.functional.pad(q, [0, 0, 0, 0, *(x for halo in reversed(halos) for x in halo)])

    def circular(t: Tensor) -> Tensor:
        for i, (left, right) in enumerate(halos, 1):
            if left + right > 0:
                t = torch.cat([t.narrow(i, t.shape[i] - left, left), t, t.narrow(i, 0, right)], i)
        return t

    return q, circular(k), circular(v)


def _scale(scale: float | None, q: Tensor) -> float:
    if scale is None:
        return 1.0 / math.sqrt(q.shape[-1])
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"{_OP}: scale must be a float or None, got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"{_OP}: scale is {scale}, expected a finite number")
    return float(scale)


def _check_shapes(
    q: Tensor, k: Tensor, v: Tensor, additional_k: Tensor | None, additional_v: Tensor | None
) -> None:
    if q.dim() not in (4, 5, 6):
        _runtime.shape_error(_OP, "q", q, "[B, *X, H, D] with 1, 2 or 3 spatial dimensions X")
    for name, t in (("k", k), ("v", v)):
        if t.dim() != q.dim() or t.shape[:-2] != q.shape[:-2]:
            _runtime.shape_error(
                _OP,
                name,
                t,
                f"the batch and spatial sizes of q, {list(q.shape[:-2])}, then heads and features",
            )
    if k.shape[-1] != q.shape[-1]:
        _runtime.shape_error(_OP, "k", k, f"the head dim of q, {q.shape[-1]}")
    if v.shape[-2] != k.shape[-2]:
        _runtime.shape_error(_OP, "v", v, f"as many heads as k, {k.shape[-2]}")
    heads, heads_kv = q.shape[-2], k.shape[-2]
    if heads != heads_kv and (heads_kv == 0 or heads == 0 or heads % heads_kv != 0):
        raise ValueError(
            f"{_OP}: q has {heads} heads, expected a multiple of the {heads_kv} heads of k and v"
        )
    if q.shape[-1] == 0 or v.shape[-1] == 0:
        raise ValueError(
            f"{_OP}: head dims must be at least 1, got {q.shape[-1]} of q and {v.shape[-1]} of v"
        )
    if additional_k is not None and additional_v is not None:
        tokens = additional_k.shape[1] if additional_k.dim() == 4 else 0
        for name, t, like in (("additional_keys", additional_k, k), ("additional_values", additional_v, v)):
            ends = (q.shape[0], like.shape[-2], like.shape[-1])
            if t.dim() != 4 or (t.shape[0], t.shape[2], t.shape[3]) != ends:
                _runtime.shape_error(_OP, name, t, f"[{ends[0]}, M, {ends[1]}, {ends[2]}]")
            if t.shape[1] != tokens:
                _runtime.shape_error(_OP, name, t, f"as many tokens as additional_keys, {tokens}")
        if tokens < 1:
            _runtime.shape_error(_OP, "additional_keys", additional_k, "at least one token")


def _window_parameters(
    size: tuple[int, ...], heads: int, heads_kv: int, kernel_size: object, stride: object, dilation: object, is_causal: object
) -> tuple[list[int], list[int], list[int], list[int]]:  # fmt: skip
    """The four parameters as lists, checked: one entry per dimension, or that many for every query head."""
    given = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation, "is_causal": is_causal}
    if not any(_is_per_head(value) for value in given.values()):
        return windows_of_head(size, kernel_size, stride, dilation, is_causal)
    for name, value in given.items():
        if _is_per_head(value) and len(value) != heads:  # type: ignore[arg-type]
            raise ValueError(
                f"{_OP}: {name} is {value!r}, expected one value, one per spatial dimension, or one tuple of those"
                f" for each of the {heads} heads of q"
            )
    rows = [
        windows_of_head(size, *(v[h] if _is_per_head(v) else v for v in given.values()))  # type: ignore[index,arg-type]
        for h in range(heads)
    ]
    shared = heads // heads_kv if heads_kv else 1
    for h, row in enumerate(rows):
        if row != rows[h - h % shared]:
            raise ValueError(
                f"{_OP}: query heads {h - h % shared} and {h} share a head of k and v, but have the windows"
                f" {rows[h - h % shared]} and {row}; expected the same"
            )
    window, strides, dilations, causal = ([x for row in rows for x in row[i]] for i in range(4))
    return window, strides, dilations, causal


def _is_per_head(value: object) -> bool:
    return isinstance(value, (tuple, list)) and any(isinstance(entry, (tuple, list)) for entry in value)


def windows_of_head(
    size: tuple[int, ...],
    kernel_size: object,
    stride: object,
    dilation: object,
    is_causal: object,
    op: str = _OP,
) -> tuple[list[int], list[int], list[int], list[int]]:
    """The parameters of one head as lists with one entry per dimension, checked against each other and the sizes."""
    n = len(size)
    kernel_size = [-1 if w is None else w for w in _per_dimension("kernel_size", kernel_size, n, op)]
    windows = _integers("kernel_size", kernel_size, op)
    strides = _integers("stride", _per_dimension("stride", stride, n, op), op)
    dilations = _integers("dilation", _per_dimension("dilation", dilation, n, op), op)
    causal = _per_dimension("is_causal", is_causal, n, op)
    for c in causal:
        if not isinstance(c, bool):
            raise TypeError(f"{op}: is_causal must be a bool or one bool per dimension, got {is_causal!r}")
    for name, values in (("stride", strides), ("dilation", dilations)):
        if any(value < 1 for value in values):
            raise ValueError(f"{op}: {name} is {values}, expected at least 1 in every dimension")
    windows = [x // d if w == -1 else w for w, d, x in zip(windows, dilations, size, strict=True)]
    if any(w < 1 for w in windows):
        raise ValueError(
            f"{op}: kernel_size is {kernel_size} for input size {list(size)} and dilation {dilations},"
            " expected at least 1 in every dimension, or -1 or None for the whole dimension"
        )
    if any(w * d > x for w, d, x in zip(windows, dilations, size, strict=True)):
        raise ValueError(
            f"{op}: the product of kernel_size {windows} and dilation {dilations} exceeds the input size"
            f" {list(size)}"
        )
    if any(s > w for s, w in zip(strides, windows, strict=True)):
        raise ValueError(
            f"{op}: stride is {strides}, expected at most kernel_size {windows}, else no query sees the keys"
            " in between"
        )
    return windows, strides, dilations, [int(c) for c in causal]


def _per_dimension(name: str, value: object, n: int, op: str = _OP) -> list[Any]:
    if not isinstance(value, (tuple, list)):
        return [value] * n
    if len(value) != n:
        raise ValueError(
            f"{op}: {name} is {value!r}, expected one value or {n}, one per spatial dimension of q"
        )
    return list(value)


def _integers(name: str, values: list[Any], op: str = _OP) -> list[int]:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{op}: {name} must be an int or one int per dimension, got {value!r}")
    return values


def _fwd_fake(
    q: Tensor, k: Tensor, v: Tensor, additional_k: Tensor | None, additional_v: Tensor | None,
    kernel_size: list[int], stride: list[int], dilation: list[int], is_causal: list[int], scale: float,
    backend: str | None = None, bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    stat = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=stat)


def _bwd_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    additional_k: Tensor | None, additional_v: Tensor | None,
    kernel_size: list[int], stride: list[int], dilation: list[int], is_causal: list[int], scale: float, deterministic: bool,
    backend: str | None = None, bias: Tensor | None = None, bias_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shapes = [t.shape if t is not None else (0,) for t in (q, k, v, additional_k, additional_v)]
    dq, dk, dv, add_dk, add_dv = (q.new_empty(shape) for shape in shapes)
    stat = torch.float64 if q.dtype == torch.float64 else torch.float32
    dbias = q.new_empty(bias.shape if bias is not None and bias_gradient else (0,), dtype=stat)
    return dq, dk, dv, add_dk, add_dv, dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, additional_k, additional_v, *ctx.parameters, ctx.backend, bias = inputs
    ctx.save_for_backward(q, k, v, *output, additional_k, additional_v, bias)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, additional_k, additional_v, bias = ctx.saved_tensors
    if dout is None:
        if dlse is None:
            return (None,) * 12
        dout = torch.zeros_like(out)
    bias_gradient = bias is not None and ctx.needs_input_grad[11]
    dq, dk, dv, add_dk, add_dv, dbias = _gradient(
        dout, dlse, q, k, v, out, lse, additional_k, additional_v, *ctx.parameters,
        torch.are_deterministic_algorithms_enabled(), ctx.backend, bias, bias_gradient,
    )  # fmt: skip
    additional = (None, None) if additional_k is None else (add_dk, add_dv)
    return dq, dk, dv, *additional, *(None,) * 6, dbias if bias_gradient else None


torch.library.register_fake("nearfield::gna_fwd", _fwd_fake)
torch.library.register_fake("nearfield::gna_bwd", _bwd_fake)


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError(f"{_OP}: second derivatives are not implemented; supported: first derivatives")


_attend = _runtime.differentiable("gna_fwd", _backward, _setup_context)
# Without a rule, torch would treat the gradients as constants and only warn.
_gradient = _runtime.differentiable("gna_bwd", _no_second_derivative)
