"""Neighborhood attention in one, two and three dimensions."""

from nearfield.gna.explain import NeighborhoodExplanation
from nearfield.gna.op import merge_attentions, neighborhood_attention
from nearfield.gna.reference import neighborhood_attention_reference

__all__ = [
    "NeighborhoodExplanation",
    "merge_attentions",
    "neighborhood_attention",
    "neighborhood_attention_reference",
]
