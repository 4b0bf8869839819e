"""Gated DeltaNet as a layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nearfield.nn.delta_layer import Decay, DeltaLayer


class GatedDeltaNet(DeltaLayer):
    """Gated DeltaNet (arXiv 2412.06464): DeltaNet whose memory fades at a rate that each token chooses.

    The log decay is ``-exp(A_log) softplus(W x + dt_bias)`` per value head, computed inside the kernel.
    ``forward(x, cache=None)`` maps ``[B, T, dim]`` to the same; ``new_cache(batch)`` starts incremental decoding.

    Args:
        dim: channels of input and output.
        num_heads: heads of queries and keys.
        head_dim: channels of a query or key.
        num_v_heads: heads of values, a multiple of num_heads (grouped value attention); default num_heads.
        head_v_dim: channels of a value; default ``2 head_dim``, as in the paper.
        conv_size: tokens that the short convolutions see; 1: no mixing.
        use_output_gate: gate the normed output with ``silu(W x)``.
        allow_neg_eigval: write strengths up to 2 (arXiv 2411.12537).
        norm_eps: of the output norm.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 6,
        *,
        head_dim: int = 256,
        num_v_heads: int | None = None,
        head_v_dim: int | None = None,
        conv_size: int = 4,
        use_output_gate: bool = True,
        allow_neg_eigval: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            head_dim,
            num_heads if num_v_heads is None else num_v_heads,
            2 * head_dim if head_v_dim is None else head_v_dim,
            conv_size,
            use_output_gate,
            allow_neg_eigval,
            norm_eps,
        )
        self.a_proj = nn.Linear(dim, self.num_v_heads, bias=False)
        # As in Mamba2: rates up to 16, time steps spread evenly over the logarithm of 0.001 to 0.1.
        self.A_log = nn.Parameter(torch.empty(self.num_v_heads).uniform_(1e-4, 16).log())
        dt = torch.empty(self.num_v_heads).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt

    def decay(self, x: Tensor) -> Decay:
        return {"g": self.a_proj(x), "gate": "softplus", "A_log": self.A_log, "dt_bias": self.dt_bias}
