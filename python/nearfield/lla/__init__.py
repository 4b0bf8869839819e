"""Local linear attention: a weighted affine fit around every query instead of a weighted mean."""

from nearfield.lla.op import (
    SolveInfo,
    local_linear_attention,
    local_linear_attention_step,
    probe_attention,
)

__all__ = ["SolveInfo", "local_linear_attention", "local_linear_attention_step", "probe_attention"]
