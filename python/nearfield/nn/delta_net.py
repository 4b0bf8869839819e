"""DeltaNet as a layer."""

from __future__ import annotations

from nearfield.nn.delta_layer import DeltaLayer


class DeltaNet(DeltaLayer):
    """DeltaNet (arXiv 2406.06484): linear attention whose memory is corrected by every token and never fades.

    ``forward(x, cache=None)`` maps ``[B, T, dim]`` to the same; ``new_cache(batch)`` starts incremental decoding.

    Args:
        dim: channels of input and output.
        num_heads: heads of queries and keys.
        head_dim: channels of a query or key; default ``dim / num_heads``.
        num_v_heads: heads of values, a multiple of num_heads (grouped value attention); default num_heads.
        head_v_dim: channels of a value; default head_dim.
        conv_size: tokens that the short convolutions see; 1: no mixing.
        use_output_gate: gate the normed output with ``silu(W x)``.
        allow_neg_eigval: write strengths up to 2, so that a token can reverse what is stored under its key
            (arXiv 2411.12537).
        norm_eps: of the output norm.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        head_dim: int | None = None,
        num_v_heads: int | None = None,
        head_v_dim: int | None = None,
        conv_size: int = 4,
        use_output_gate: bool = False,
        allow_neg_eigval: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        if head_dim is None:
            if num_heads < 1 or dim % num_heads:
                raise ValueError(
                    f"DeltaNet: dim {dim} is no multiple of num_heads {num_heads}; pass head_dim"
                )
            head_dim = dim // num_heads
        super().__init__(
            dim,
            num_heads,
            head_dim,
            num_heads if num_v_heads is None else num_v_heads,
            head_dim if head_v_dim is None else head_v_dim,
            conv_size,
            use_output_gate,
            allow_neg_eigval,
            norm_eps,
        )
