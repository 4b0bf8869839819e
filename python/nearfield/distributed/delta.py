"""The delta rule of sequences that are split over processes along time."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nearfield import _runtime
from nearfield.delta.op import (
    BETA_ACTIVATIONS,
    FWD_DEVICES,
    GATES,
    BetaActivation,
    Gate,
    _check_inputs,
    _check_options,
    _check_state,
)
from nearfield.delta.spans import transition
from nearfield.distributed.replicated import replicated

_OP = "distributed.delta_rule"


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm: bool = False,
    beta_activation: BetaActivation = "none",
    gate: Gate = "log",
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    gate_bound: float = -5.0,
    state_v_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """:func:`nearfield.delta_rule` on sequences of which every process holds a span, in the order of the ranks.

    What a span does to the memory is affine, ``S_out = M S_in + N``. All processes compute their (N, M) at the same
    time, in one pass of the kernel with K more value channels, exchange them, compose those before their own, and run
    their span from the state they got. The backward does the same with the gradient of the state, which runs through
    ``dS_in = M^T dS_out + D``. So the time falls with the number of processes at about 2.5 times the work; passing the
    state from process to process would do the work once, but one process after the other, as slow as a single one.
    The result is exact: nothing is cut off.

    Args:
        q, k, v, beta, g: this process's span of tokens; the spans may have different lengths.
        group: the processes; None: all.
        initial_state: state before the first token of the first process; None elsewhere.
        output_final_state: also return the state after this process's last token; the last process's is the end.
        A_log, dt_bias: the same on every process; so are their gradients, the sums over all.
        scale, use_qk_l2norm, beta_activation, gate, gate_bound, state_v_first: as in :func:`nearfield.delta_rule`.

    Returns:
        ``o`` of this process's tokens, and its state or None.
    """
    if initial_state is not None and dist.get_rank(group) > 0:
        raise ValueError(
            f"{_OP}: initial_state is given on process {dist.get_rank(group)}, expected on process 0 only, where the "
            "sequences begin"
        )
    _check_inputs(_OP, q, k, v, beta, g, A_log, dt_bias, initial_state=initial_state)
    q, k, v = _runtime.autocast(q, k, v)
    _check_options(_OP, q, k, v, beta, g, A_log, dt_bias, beta_activation, gate, gate_bound)
    (B, _, _, K), (HV, V) = q.shape, v.shape[2:]
    if initial_state is not None:
        _check_state(_OP, "initial_state", initial_state, q, [B, HV, K, V], state_v_first)
    _runtime.check_device(_OP, q, FWD_DEVICES)
    scale = K**-0.5 if scale is None else float(scale)
    A_log, dt_bias = (t if t is None else replicated(t, group) for t in (A_log, dt_bias))
    if dt_bias is not None:
        dt_bias = dt_bias.reshape(-1)
    if initial_state is not None and state_v_first:
        initial_state = initial_state.mT.contiguous()
    options = (scale, use_qk_l2norm, BETA_ACTIVATIONS[beta_activation], GATES[gate], gate_bound, False)
    o, state = _Spans.apply(q, k, v, beta, g, initial_state, A_log, dt_bias, options, group)  # type: ignore[no-untyped-call]
    if not output_final_state:
        return o, None
    return o, state.mT if state_v_first else state


class _Spans(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial_state: Tensor | None,
        A_log: Tensor | None, dt_bias: Tensor | None, options: tuple[Any, ...], group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        M, N = transition(k, v, beta, g, A_log, dt_bias, None, options)
        if initial_state is not None:
            N = N + M @ initial_state  # the others need not know of it
        state = initial_state
        for N_span, M_span in _gather_pairs(N, M, group)[: dist.get_rank(group)]:
            state = N_span if state is None else N_span + M_span @ state
        ops = torch.ops.nearfield
        forward = ops.delta_fwd_kept if any(ctx.needs_input_grad) else ops.delta_fwd
        o, final, *kept = forward(q, k, v, beta, g, state, A_log, dt_bias, None, *options, True)
        ctx.save_for_backward(q, k, v, beta, g, state, A_log, dt_bias, M, *kept)
        ctx.options, ctx.group = options, group
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, M, kept = ctx.saved_tensors
        if d_o is None:
            d_o = torch.zeros_like(inputs[2])

        def gradients(d_state: Tensor | None) -> tuple[Tensor, ...]:
            grads: tuple[Tensor, ...] = torch.ops.nearfield.delta_bwd(
                d_o, d_state, *inputs, None, *ctx.options, None, kept
            )
            return grads

        grads = gradients(d_final)  # as if no other span followed
        # The first process may have no state; nobody asks for its gradient.
        D = (
            grads[5]
            if inputs[5] is not None
            else torch.zeros_like(M[..., :1]).expand(*M.shape[:-1], inputs[2].shape[3])
        )
        d_state = None
        for D_span, M_span in _gather_pairs(D, M, ctx.group)[: dist.get_rank(ctx.group) : -1]:
            d_state = D_span if d_state is None else D_span + M_span.mT @ d_state
        if d_state is not None:
            grads = gradients(d_state if d_final is None else d_state + d_final)
        needed = ctx.needs_input_grad
        return (*(grad if need else None for grad, need in zip(grads, needed, strict=False)), None, None)


def _gather_pairs(a: Tensor, b: Tensor, group: dist.ProcessGroup | None) -> list[tuple[Tensor, Tensor]]:
    """Every process's two matrices, by rank."""
    mine = torch.cat([a, b], -1).contiguous()
    everybody = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everybody, mine, group=group)
    return [(pair[..., : a.shape[-1]], pair[..., a.shape[-1] :]) for pair in everybody]
