"""nearfield: neighborhood attention, the delta rule and local linear attention for PyTorch."""

from nearfield import _runtime

__version__ = "0.1.0"
__all__ = ["__version__"]

del _runtime
