"""nearfield: neighborhood attention, the delta rule and local linear attention for PyTorch."""

from nearfield import _runtime, delta, gna, lla, nn
from nearfield._explain import explain
from nearfield.delta import delta_rule, delta_rule_step
from nearfield.gna import merge_attentions, neighborhood_attention
from nearfield.lla import (
    local_linear_attention,
    local_linear_attention_step,
    neighborhood_local_linear_attention,
    neighborhood_probe_attention,
    probe_attention,
)

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "delta",
    "delta_rule",
    "delta_rule_step",
    "explain",
    "gna",
    "lla",
    "local_linear_attention",
    "local_linear_attention_step",
    "merge_attentions",
    "neighborhood_attention",
    "neighborhood_local_linear_attention",
    "neighborhood_probe_attention",
    "nn",
    "probe_attention",
]

del _runtime
