"""nearfield: neighborhood attention, the delta rule and local linear attention for PyTorch."""

from nearfield import _runtime
from nearfield.gna import merge_attentions, neighborhood_attention
from nearfield.lla import local_linear_attention, local_linear_attention_step, probe_attention

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "local_linear_attention",
    "local_linear_attention_step",
    "merge_attentions",
    "neighborhood_attention",
    "probe_attention",
]

del _runtime
