"""Context parallelism: the operators on tensors whose positions are split over the processes of a group.

Every process of the group has to take part in every call, and in its backward if any of them does.
"""

from nearfield.distributed.convolution import short_convolution
from nearfield.distributed.delta import delta_rule
from nearfield.distributed.neighborhood import neighborhood_attention

__all__ = ["delta_rule", "neighborhood_attention", "short_convolution"]
