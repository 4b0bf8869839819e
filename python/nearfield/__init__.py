"""nearfield: neighborhood attention, the delta rule and local linear attention for PyTorch."""

from nearfield import _runtime
from nearfield.gna import merge_attentions, neighborhood_attention

__version__ = "0.1.0"
__all__ = ["__version__", "merge_attentions", "neighborhood_attention"]

del _runtime
