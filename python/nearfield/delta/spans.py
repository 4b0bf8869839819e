"""Parts of sequences: the states inside a sequence, for prefix caches, and what a span does to a state."""

from __future__ import annotations

import torch
from torch import Tensor

from nearfield import _runtime
from nearfield.delta.op import (
    BETA_ACTIVATIONS,
    GATES,
    BetaActivation,
    Gate,
    _check_backend,
    _flat,
    _forward,
    _state_dtype,
    check_rule,
)


def delta_rule_states(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    every: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm: bool = False,
    beta_activation: BetaActivation = "none",
    gate: Gate = "log",
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    gate_bound: float = -5.0,
    state_v_first: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`nearfield.delta_rule`, and the states at chunk boundaries inside the sequences: what a prefix cache keeps.

    Args:
        every: chunks of 64 tokens from one kept state to the next, at least 1.
        the others: as in ``delta_rule``. There is no gradient.

    Returns:
        ``o``, the final state, and the states ``[B, T // (64 every), HV, K, V]`` (``[.., V, K]`` if state_v_first)
        in float32 (float64 for float64 inputs): entry i is the state after ``64 every (i + 1)`` tokens. Of packed
        sequences, the one that starts at token t begins with entry ``t // (64 every)`` and has one entry for every
        ``64 every`` of its tokens; entries that belong to none are 0.
    """
    op = "delta_rule_states"
    if every < 1:
        raise ValueError(f"{op}: every is {every}, expected at least 1")
    inputs = (q, k, v, beta, g, initial_state, A_log, dt_bias)
    if _runtime.differentiated(inputs):
        raise ValueError(f"{op}: has no gradient, but an input requires one; call it under torch.no_grad()")
    q, k, v, scale = check_rule(
        op, q, k, v, beta, g, scale, initial_state, cu_seqlens, beta_activation, gate, A_log, dt_bias, gate_bound,
        state_v_first,
    )  # fmt: skip
    _check_backend(op, backend, q, k, v, beta, g, has_gradient=False)
    o, final_state, states = torch.ops.nearfield.delta_fwd_states(
        q, k, v, beta, g, initial_state, A_log, _flat(dt_bias), cu_seqlens, scale, use_qk_l2norm,
        BETA_ACTIVATIONS[beta_activation], GATES[gate], gate_bound, state_v_first, True, every, backend,
    )  # fmt: skip
    return o, final_state, states


def delta_rule_transition(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm: bool = False,
    beta_activation: BetaActivation = "none",
    gate: Gate = "log",
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    gate_bound: float = -5.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """What a span of tokens does to the state that enters it: ``S -> M S + N``, whatever S.

    Spans compose, ``(M2 M1, M2 N1 + N2)``, so a long sequence can be walked in parts by several GPUs, or a cached
    prefix continued. Each sequence, of the batch or packed by cu_seqlens, is one span.

    Args:
        k, v, beta, g and the options: as in :func:`nearfield.delta_rule`.

    Returns:
        M ``[N, HV, K, K]`` and N ``[N, HV, K, V]`` in float32 (float64 for float64 inputs).
    """
    k, _, v, _ = check_rule(
        "delta_rule_transition", k, k, v, beta, g, None, None, cu_seqlens, beta_activation, gate, A_log, dt_bias,
        gate_bound, False,
    )  # fmt: skip
    _check_backend("delta_rule_transition", backend, k, k, v, beta, g)
    options = (1.0, use_qk_l2norm, BETA_ACTIVATIONS[beta_activation], GATES[gate], gate_bound, False)
    return transition(k, v, beta, g, A_log, _flat(dt_bias), cu_seqlens, options, backend)


def transition(
    k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, A_log: Tensor | None, dt_bias: Tensor | None,
    cu_seqlens: Tensor | None, options: tuple[float, bool, int, int, float, bool], backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The columns of a state are independent: those of N start from nothing, those of M are the identity's, without
    values. So both are the final state of one walk over V + K columns."""
    (B, T, HV, V), K = v.shape, k.shape[3]
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    identity = torch.eye(K, dtype=_state_dtype(k), device=k.device).expand(sequences, HV, K, K)
    start = torch.cat([identity.new_zeros(sequences, HV, K, V), identity], -1)
    values = torch.cat([v, v.new_zeros(B, T, HV, K)], -1)
    end: Tensor = _forward(k, k, values, beta, g, start, A_log, dt_bias, cu_seqlens, *options, True, backend)[
        1
    ]
    return end[..., V:].contiguous(), end[..., :V].contiguous()
