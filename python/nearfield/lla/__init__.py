"""Local linear attention: a weighted affine fit around every query instead of a weighted mean."""

from nearfield.lla.explain import LocalLinearExplanation
from nearfield.lla.neighborhood import neighborhood_local_linear_attention, neighborhood_probe_attention
from nearfield.lla.op import (
    SolveInfo,
    local_linear_attention,
    local_linear_attention_step,
    probe_attention,
)

__all__ = [
    "LocalLinearExplanation",
    "SolveInfo",
    "local_linear_attention",
    "local_linear_attention_step",
    "neighborhood_local_linear_attention",
    "neighborhood_probe_attention",
    "probe_attention",
]
