"""NATTEN's functions with nearfield's kernels: the signatures of NATTEN 0.21, and a switch for an installed NATTEN.

Either import from here instead of from NATTEN::

    from nearfield.compat.natten import na2d

or leave a program as it is and swap the functions inside NATTEN, its modules included::

    from nearfield.compat import natten
    natten.patch()

Arguments that choose among NATTEN's kernels (backend, tile shapes, schedules) have no meaning here and raise.
Windows of 1, ``-1`` for a whole dimension, and gradients through the returned lse work, which NATTEN does not offer.
Whether gradients repeat to the bit is up to ``torch.use_deterministic_algorithms``, not to NATTEN's switch.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from nearfield import gna
from nearfield.compat._swap import Swap

__all__ = ["attention", "merge_attentions", "na1d", "na2d", "na3d", "patch", "patched", "unpatch"]

P = ParamSpec("P")
R = TypeVar("R")

Result = Tensor | tuple[Tensor, Tensor]


def neighborhood_attention_generic(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = 1,
    dilation: int | Sequence[int] | None = 1,
    is_causal: bool | Sequence[bool] | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    backend: str | None = None,
    q_tile_shape: Sequence[int] | None = None,
    kv_tile_shape: Sequence[int] | None = None,
    backward_q_tile_shape: Sequence[int] | None = None,
    backward_kv_tile_shape: Sequence[int] | None = None,
    backward_kv_splits: Sequence[int] | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: object = None,
    torch_compile: bool = False,
    return_lse: bool = False,
) -> Result:
    """Neighborhood attention with NATTEN's arguments; see :func:`nearfield.neighborhood_attention`.

    Args:
        query: ``[B, *X, H, D]``, with as many spatial dimensions X as the function's name says.
        key, value: ``[B, *X, Hkv, D]`` and ``[B, *X, Hkv, Dv]``.
        kernel_size, stride, dilation, is_causal: one value or one per dimension; None: the default.
        scale: None or, as in NATTEN, 0: ``D ** -0.5``.
        additional_keys, additional_values: ``[B, M, Hkv, D]`` and ``[B, M, Hkv, Dv]``.
        return_lse: also return ``lse [B, *X, H]``.
        attention_kwargs, backend and what follows: choices among NATTEN's kernels, which must be left alone.
    """
    _refuse_tuning(
        "na1d, na2d, na3d",
        attention_kwargs=attention_kwargs or None,
        backend=backend,
        q_tile_shape=q_tile_shape,
        kv_tile_shape=kv_tile_shape,
        backward_q_tile_shape=backward_q_tile_shape,
        backward_kv_tile_shape=backward_kv_tile_shape,
        backward_kv_splits=backward_kv_splits,
        backward_use_pt_reduction=backward_use_pt_reduction or None,
        run_persistent_kernel=None if run_persistent_kernel else False,
        kernel_schedule=kernel_schedule,
        torch_compile=torch_compile or None,
    )
    return gna.neighborhood_attention(
        query,
        key,
        value,
        kernel_size,
        stride=1 if stride is None else stride,
        dilation=1 if dilation is None else dilation,
        is_causal=False if is_causal is None else is_causal,
        scale=scale or None,
        additional_keys=additional_keys,
        additional_values=additional_values,
        return_lse=return_lse,
    )


def _of_rank(rank: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            query = args[0] if args else kwargs.get("query")
            if isinstance(query, Tensor) and query.dim() != rank + 3:
                raise ValueError(
                    f"na{rank}d: query has shape {list(query.shape)}, expected [B, {'X, ' * rank}H, D]"
                )
            return function(*args, **kwargs)

        checked.__name__ = checked.__qualname__ = f"na{rank}d"
        return checked

    return decorate


na1d = _of_rank(1)(neighborhood_attention_generic)
na2d = _of_rank(2)(neighborhood_attention_generic)
na3d = _of_rank(3)(neighborhood_attention_generic)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    seqlens_Q: Tensor | None = None,
    seqlens_KV: Tensor | None = None,
    cumulative_seqlen_Q: Tensor | None = None,
    cumulative_seqlen_KV: Tensor | None = None,
    max_seqlen_Q: int | None = None,
    max_seqlen_KV: int | None = None,
    backend: str | None = None,
    q_tile_size: int | None = None,
    kv_tile_size: int | None = None,
    backward_q_tile_size: int | None = None,
    backward_kv_tile_size: int | None = None,
    backward_kv_splits: int | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: object = None,
    torch_compile: bool = False,
    return_lse: bool = False,
) -> Result:
    """Attention of every query to every key, also in packed sequences of different lengths.

    Args:
        query: ``[B, m, H, D]``.
        key, value: ``[B, n, Hkv, D]`` and ``[B, n, Hkv, Dv]``.
        is_causal: query i sees keys up to i; every sequence needs as many keys as queries.
        scale: None or, as in NATTEN, 0: ``D ** -0.5``.
        seqlens_Q, seqlens_KV: ``[N]``, lengths of the sequences that a batch of 1 packs end to end.
        cumulative_seqlen_Q, cumulative_seqlen_KV: ``[N + 1]``, their starts and ends, instead of the lengths. Either
            way the lengths are read on the host, and each sequence is a call of the kernel.
        max_seqlen_Q, max_seqlen_KV: not needed; checked against the lengths.
        return_lse: also return ``lse [B, m, H]``.
        backend and what follows: choices among NATTEN's kernels, which must be left alone.
    """
    _refuse_tuning(
        "attention",
        backend=backend,
        q_tile_size=q_tile_size,
        kv_tile_size=kv_tile_size,
        backward_q_tile_size=backward_q_tile_size,
        backward_kv_tile_size=backward_kv_tile_size,
        backward_kv_splits=backward_kv_splits,
        backward_use_pt_reduction=backward_use_pt_reduction or None,
        run_persistent_kernel=None if run_persistent_kernel else False,
        kernel_schedule=kernel_schedule,
        torch_compile=torch_compile or None,
    )
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() != 4:
            raise ValueError(f"attention: {name} has shape {list(t.shape)}, expected [B, tokens, H, D]")
    if query.shape[0] != key.shape[0] or key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"attention: got query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)}, expected "
            "[B, m, H, D], [B, n, Hkv, D] and [B, n, Hkv, Dv]"
        )
    starts_q = _starts("Q", query, seqlens_Q, cumulative_seqlen_Q, max_seqlen_Q)
    starts_kv = _starts("KV", key, seqlens_KV, cumulative_seqlen_KV, max_seqlen_KV)
    if (starts_q is None) != (starts_kv is None) or len(starts_q or ()) != len(starts_kv or ()):
        raise ValueError("attention: lengths of Q and KV must be given together and for as many sequences")
    if starts_q is None or starts_kv is None:
        out, lse = _dense(query, key, value, is_causal, scale or None)
    else:
        parts = [
            _dense(query[:, q0:q1], key[:, k0:k1], value[:, k0:k1], is_causal, scale or None)
            for (q0, q1), (k0, k1) in zip(pairwise(starts_q), pairwise(starts_kv), strict=True)
        ]
        out, lse = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return (out, lse) if return_lse else out


def _starts(
    which: str, tokens: Tensor, lengths: Tensor | None, starts: Tensor | None, longest: int | None
) -> list[int] | None:
    """Where the packed sequences begin and the last one ends, or None without packing."""
    if lengths is None and starts is None:
        if longest:
            raise ValueError(
                f"attention: max_seqlen_{which} is {longest}, but cumulative_seqlen_{which} is missing"
            )
        return None
    if lengths is not None and starts is not None:
        raise ValueError(f"attention: give seqlens_{which} or cumulative_seqlen_{which}, not both")
    if tokens.shape[0] != 1:
        raise ValueError(
            f"attention: sequences are packed into a batch of 1, but the batch is {tokens.shape[0]}"
        )
    if starts is not None:
        bounds = [int(x) for x in starts.tolist()]
    else:
        assert lengths is not None
        bounds = [0, *(int(x) for x in lengths.cumsum(0).tolist())]
    steps = [b - a for a, b in pairwise(bounds)]
    if not steps or bounds[0] != 0 or min(steps) < 0 or bounds[-1] != tokens.shape[1]:
        raise ValueError(
            f"attention: the sequences of {which} begin and end at {bounds}, expected a rise from 0 to {tokens.shape[1]}"
        )
    if longest is not None and longest < max(steps):
        raise ValueError(
            f"attention: max_seqlen_{which} is {longest}, but a sequence has {max(steps)} tokens"
        )
    return bounds


def _dense(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention of m queries to n keys as neighborhood attention whose window is everything."""
    m, n = query.shape[1], key.shape[1]
    if is_causal and m != n:
        raise NotImplementedError(
            f"attention: is_causal with {m} queries and {n} keys is not supported; supported: as many keys as queries"
        )
    if m == 0 or n == 0:
        statistics = torch.float64 if query.dtype == torch.float64 else torch.float32
        lse = query.new_full(query.shape[:3], -torch.inf, dtype=statistics)
        return query.new_zeros(*query.shape[:3], value.shape[-1]), lse
    extra_k = extra_v = None
    groups = 1
    if n > m:  # the grid has m places; the other keys are tokens that all see
        key, extra_k = key[:, :m], key[:, m:]
        value, extra_v = value[:, :m], value[:, m:]
    elif n < m:  # grids of n places, each with all keys
        groups = -(-m // n)
        query = F.pad(query, (0, 0, 0, 0, 0, groups * n - m))
        query = torch.unflatten(query, 1, (groups, n)).flatten(0, 1)
        key, value = (t.repeat_interleave(groups, 0) for t in (key, value))
    result = gna.neighborhood_attention(
        query,
        key,
        value,
        key.shape[1],
        is_causal=is_causal,
        scale=scale,
        additional_keys=extra_k,
        additional_values=extra_v,
        return_lse=True,
    )
    out, lse = (torch.unflatten(t, 0, (-1, groups)).flatten(1, 2)[:, :m] for t in result)
    return out, lse


def merge_attentions(
    outputs: Sequence[Tensor],
    lse_tensors: Sequence[Tensor],
    torch_compile: bool = True,
    use_autograd_fix: bool = True,
) -> tuple[Tensor, Tensor]:
    """Joins attention of the same queries over disjoint keys; see :func:`nearfield.merge_attentions`.

    Both switches only say how NATTEN gets its gradients and speed. Here merging is plain differentiable PyTorch whose
    gradients are right either way, because nearfield's attention has a gradient for lse.

    Args:
        outputs: at least two ``[B, m, H, Dv]``.
        lse_tensors: as many ``[B, m, H]``.

    Returns:
        ``(out, lse)``.
    """
    if len(outputs) < 2:
        raise ValueError(f"merge_attentions: got {len(outputs)} outputs, expected at least two")
    return gna.merge_attentions(outputs, lse_tensors)


def _refuse_tuning(function: str, **given: object) -> None:
    """Every value is None where the caller left the argument at its default."""
    for name, value in given.items():
        if value is not None:
            raise NotImplementedError(
                f"{function}: {name}={value!r} chooses among NATTEN's kernels and has no meaning in nearfield; leave it out"
            )


_SWAP = Swap()


def patch() -> None:
    """Makes an installed NATTEN run on nearfield, wherever its functions were already imported to.

    Covers na1d, na2d, na3d, attention, merge_attentions and NATTEN's modules. A second call changes nothing.
    """
    try:
        natten, functional = (importlib.import_module(name) for name in ("natten", "natten.functional"))
    except ImportError as error:
        raise ImportError(f"nearfield.compat.natten.patch: NATTEN cannot be imported ({error})") from error
    ours = (na1d, na2d, na3d, attention, merge_attentions, neighborhood_attention_generic)
    missing = [f.__name__ for f in ours if not hasattr(functional, f.__name__)]
    if missing:
        raise ImportError(
            f"nearfield.compat.natten.patch: natten {natten.__version__} has no {', '.join(missing)}; supported: 0.21"
        )
    _SWAP.install([(getattr(functional, f.__name__), f) for f in ours])


def unpatch() -> None:
    """Undoes :func:`patch`."""
    _SWAP.remove()


@contextmanager
def patched() -> Iterator[None]:
    """``with patched():`` NATTEN runs on nearfield. Inside an earlier :func:`patch` it changes nothing."""
    before = _SWAP.installed
    patch()
    try:
        yield
    finally:
        if not before:
            unpatch()
