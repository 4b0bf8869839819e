"""The delta rule token by token: the definition of what ``delta_rule`` computes, slow and differentiable."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

NORM_EPS = 1e-6


def l2norm(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + NORM_EPS).rsqrt()


def activate_beta(beta: Tensor, activation: str) -> Tensor:
    if activation == "none":
        return beta
    return beta.sigmoid() * (2 if activation == "sigmoid2" else 1)


def activate_gate(
    g: Tensor, gate: str, A_log: Tensor | None, dt_bias: Tensor | None, gate_bound: float
) -> Tensor:
    """The log decay: g, ``-exp(A_log) softplus(g + bias)`` or ``bound * sigmoid(exp(A_log) (g + bias))``."""
    if gate == "log":
        return g
    per_head = (-1,) + (1,) * (g.dim() - 3)
    x = g if dt_bias is None else g + dt_bias.reshape(g.shape[2:])
    rate = torch.ones((), dtype=g.dtype) if A_log is None else A_log.exp().reshape(per_head)
    if gate == "softplus":
        return rate * logsigmoid(-x)  # -softplus(x), without softplus's threshold
    return gate_bound * torch.sigmoid(rate * x)


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, scale: float, S: Tensor
) -> tuple[Tensor, Tensor]:
    """Heads first: q, k ``[B, HV, T, K]``, v and beta too, g ``[B, HV, T, K or 1]``, S ``[B, HV, K, V]``."""
    outputs = []
    for t in range(q.shape[2]):
        if g is not None:
            S = g[:, :, t].exp().unsqueeze(-1) * S
        k_t = k[:, :, t].unsqueeze(-2)  # [B, HV, 1, K]
        r = v[:, :, t].unsqueeze(-2) - k_t @ S
        S = S + beta[:, :, t, None, None] * k_t.transpose(-1, -2) @ r
        outputs.append(scale * (q[:, :, t].unsqueeze(-2) @ S).squeeze(-2))
    o = torch.stack(outputs, 2) if outputs else v.new_zeros(v.shape)
    return o, S


def delta_rule_reference(
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
    beta_activation: str = "none",
    gate: str = "log",
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    gate_bound: float = -5.0,
    state_v_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Same arguments and results as :func:`nearfield.delta_rule`, computed in the dtypes of the tensors.

    With alpha = exp(g), per token and value head::

        S <- alpha . S;   r = v - S^T k;   S <- S + beta k r^T;   o = scale S^T q
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    scale = K**-0.5 if scale is None else scale
    if use_qk_l2norm:
        q, k = l2norm(q), l2norm(k)
    beta = activate_beta(beta, beta_activation)
    q, k = (x.repeat_interleave(HV // H, 2) for x in (q, k))
    if g is not None:
        g = activate_gate(g, gate, A_log, dt_bias, gate_bound)
        g = g.unsqueeze(-1) if g.dim() == 3 else g
        g = g.transpose(1, 2)
    q, k, v, beta = (x.transpose(1, 2) for x in (q, k, v, beta))
    if initial_state is not None and state_v_first:
        initial_state = initial_state.transpose(-1, -2)

    bounds = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
    outputs, states = [], []
    for n, (start, end) in enumerate(pairwise(bounds)):
        if initial_state is None:
            S = v.new_zeros(B, HV, K, V)
        else:
            S = initial_state if cu_seqlens is None else initial_state[n : n + 1]
        one = (slice(None), slice(None), slice(start, end))
        o, S = recurrence(q[one], k[one], v[one], beta[one], None if g is None else g[one], scale, S)
        outputs.append(o)
        states.append(S)
    outputs.append(v.new_zeros(B, HV, T - bounds[-1], V))
    o = torch.cat(outputs, 2).transpose(1, 2)
    if not output_final_state:
        return o, None
    final_state = torch.cat(states) if states else v.new_zeros(0, HV, K, V)
    return o, final_state.transpose(-1, -2) if state_v_first else final_state


def delta_rule_states_reference(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    every: int,
    initial_state: Tensor | None,
    **options: Any,
) -> Tensor:
    """The states of :func:`nearfield.delta.delta_rule_states`: final states of longer and longer prefixes."""
    (B, T, HV, V), K = v.shape, k.shape[3]
    cu_seqlens = options.pop("cu_seqlens", None)
    rows = T // (64 * every)
    shape = (V, K) if options.get("state_v_first") else (K, V)
    states = v.new_zeros(B, rows, HV, *shape, dtype=beta.dtype)
    bounds = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
    for n, (start, end) in enumerate(pairwise(bounds)):
        S = initial_state
        if cu_seqlens is not None and initial_state is not None:
            S = initial_state[n : n + 1]
        for i in range((end - start) // (64 * every)):
            part = slice(start + 64 * every * i, start + 64 * every * (i + 1))
            k_i, g_i = k[:, part], None if g is None else g[:, part]
            _, S = delta_rule_reference(
                k_i, k_i, v[:, part], beta[:, part], g_i, initial_state=S, output_final_state=True, **options
            )
            assert S is not None
            states[:, start // (64 * every) + i] = S
    return states
