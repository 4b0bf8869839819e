"""The gated delta rule: DeltaNet, Gated DeltaNet and Kimi Delta Attention."""

from nearfield.delta.op import delta_rule, delta_rule_step
from nearfield.delta.reference import delta_rule_reference

__all__ = ["delta_rule", "delta_rule_reference", "delta_rule_step"]
