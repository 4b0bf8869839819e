"""nearfield: neighborhood attention, the delta rule and local linear attention for PyTorch."""

from nearfield import _runtime
from nearfield.delta import delta_rule, delta_rule_step

__version__ = "0.1.0"
__all__ = ["__version__", "delta_rule", "delta_rule_step"]

del _runtime
