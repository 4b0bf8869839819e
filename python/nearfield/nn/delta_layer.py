"""What DeltaNet and Gated DeltaNet share: projections, short convolutions, delta rule, output norm, cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TypedDict

import torch
from torch import Tensor, nn

from nearfield.delta import delta_rule, delta_rule_step
from nearfield.delta.op import MAX_STEP, BetaActivation, Gate
from nearfield.nn.gated_norm import GatedRMSNorm
from nearfield.nn.short_convolution import ShortConvolution


@dataclass
class DeltaCache:
    """What a delta-rule layer remembers of the tokens so far; its size does not depend on their number."""

    state: Tensor
    """``[B, HV, K, V]``, float32 (float64 for float64 layers)."""
    q: Tensor
    """The last ``conv_size - 1`` tokens before the convolution of the queries, ``[B, conv_size - 1, H K]``."""
    k: Tensor
    v: Tensor

    def tensors(self) -> Iterator[Tensor]:
        return (getattr(self, field.name) for field in fields(self))


class Decay(TypedDict, total=False):
    """Arguments of :func:`delta_rule` that say how the memory fades."""

    g: Tensor
    gate: Gate
    A_log: Tensor
    dt_bias: Tensor


class DeltaLayer(nn.Module):
    """Projections, short convolutions with SiLU, keys of unit norm, delta rule, norm per head, output projection.

    Parameters are named and shaped as in fla's layers, so that its checkpoints load. Input and output are
    ``[B, T, dim]``.
    """

    recompute = False
    """Set it to True to save memory in training on a Hopper GPU, as in :func:`nearfield.delta_rule`."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        num_v_heads: int,
        head_v_dim: int,
        conv_size: int,
        use_output_gate: bool,
        allow_neg_eigval: bool,
        norm_eps: float,
    ) -> None:
        super().__init__()
        what = type(self).__name__
        if min(dim, num_heads, head_dim, head_v_dim) < 1:
            raise ValueError(
                f"{what}: got dim {dim}, num_heads {num_heads}, head_dim {head_dim} and head_v_dim {head_v_dim}, "
                "expected at least 1 each"
            )
        if num_v_heads < num_heads or num_v_heads % num_heads:
            raise ValueError(f"{what}: num_v_heads {num_v_heads} is no multiple of num_heads {num_heads}")
        key_dim, value_dim = num_heads * head_dim, num_v_heads * head_v_dim
        self.head_dim, self.head_v_dim, self.num_v_heads = head_dim, head_v_dim, num_v_heads
        self.beta_activation: BetaActivation = "sigmoid2" if allow_neg_eigval else "sigmoid"
        self.q_proj = nn.Linear(dim, key_dim, bias=False)
        self.k_proj = nn.Linear(dim, key_dim, bias=False)
        self.v_proj = nn.Linear(dim, value_dim, bias=False)
        self.b_proj = nn.Linear(dim, num_v_heads, bias=False)
        self.q_conv1d = ShortConvolution(key_dim, conv_size)
        self.k_conv1d = ShortConvolution(key_dim, conv_size)
        self.v_conv1d = ShortConvolution(value_dim, conv_size)
        self.g_proj = nn.Linear(dim, value_dim, bias=False) if use_output_gate else None
        self.o_norm = GatedRMSNorm(head_v_dim, norm_eps)
        self.o_proj = nn.Linear(value_dim, dim, bias=False)

    def decay(self, x: Tensor) -> Decay:
        """How much of the memory each token leaves in place; nothing: all of it."""
        return {}

    def new_cache(self, batch: int) -> DeltaCache:
        """The memory before the first token, for ``batch`` sequences."""
        weight = self.q_proj.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        state = weight.new_zeros(batch, self.num_v_heads, self.head_dim, self.head_v_dim, dtype=dtype)
        convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        return DeltaCache(state, *(convolution.new_state(batch) for convolution in convolutions))

    def forward(
        self, x: Tensor, cache: DeltaCache | None = None, *, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """The next tokens ``x [B, T, dim]`` of B sequences.

        Args:
            x: tokens; without a cache the sequences begin with them.
            cache: of :meth:`new_cache`; the sequences go on from it, and it is brought up to date. No gradient
                flows through it into earlier calls.
            cu_seqlens: ``[N + 1]`` int32 or int64, starting with 0: x is ``[1, T, dim]`` and holds N sequences end to
                end, which do not see each other; the cache is one of N sequences.
        """
        what = type(self).__name__
        if x.dim() != 3:
            raise ValueError(f"{what}: x has shape {list(x.shape)}, expected [B, T, dim]")
        sequences = x.shape[0]
        if cu_seqlens is not None:
            if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or sequences != 1:
                raise ValueError(
                    f"{what}: got x of shape {list(x.shape)} and cu_seqlens of shape {list(cu_seqlens.shape)}, "
                    "expected [1, T, dim] and [N + 1]"
                )
            sequences = cu_seqlens.shape[0] - 1
        if cache is not None and cache.state.shape[0] != sequences:
            raise ValueError(f"{what}: the cache is of {cache.state.shape[0]} sequences, got {sequences}")
        before = self.new_cache(sequences) if cache is None else cache
        q, q_end = self.q_conv1d.extend(self.q_proj(x), before.q, cu_seqlens)
        k, k_end = self.k_conv1d.extend(self.k_proj(x), before.k, cu_seqlens)
        v, v_end = self.v_conv1d.extend(self.v_proj(x), before.v, cu_seqlens)
        q, k = (torch.unflatten(t, -1, (-1, self.head_dim)) for t in (q, k))
        v = torch.unflatten(v, -1, (-1, self.head_v_dim))
        beta, decay = self.b_proj(x), self.decay(x)
        step = cu_seqlens is None and 1 <= x.shape[1] <= MAX_STEP
        if cache is not None and step and not torch.is_grad_enabled():
            o = delta_rule_step(
                q, k, v, beta, **decay, state=cache.state, use_qk_l2norm=True, beta_activation=self.beta_activation
            )  # fmt: skip
        else:
            o, state = delta_rule(
                q, k, v, beta, **decay, use_qk_l2norm=True, beta_activation=self.beta_activation,
                initial_state=None if cache is None else cache.state, output_final_state=cache is not None,
                cu_seqlens=cu_seqlens, recompute=self.recompute,
            )  # fmt: skip
            if cache is not None and state is not None:
                cache.state = state.detach()
        if cache is not None:
            cache.q, cache.k, cache.v = q_end.detach(), k_end.detach(), v_end.detach()
        gate = None if self.g_proj is None else self.g_proj(x).unflatten(-1, (-1, self.head_v_dim))
        y: Tensor = self.o_proj(self.o_norm(o, gate).flatten(-2))
        return y
