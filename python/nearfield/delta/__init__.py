"""The gated delta rule: DeltaNet, Gated DeltaNet and Kimi Delta Attention."""

from nearfield.delta.explain import DeltaExplanation
from nearfield.delta.op import (
    PendingTokens,
    delta_rule,
    delta_rule_commit,
    delta_rule_step,
    delta_rule_verify,
)
from nearfield.delta.reference import delta_rule_reference, delta_rule_states_reference
from nearfield.delta.spans import delta_rule_states, delta_rule_transition

__all__ = [
    "DeltaExplanation",
    "PendingTokens",
    "delta_rule",
    "delta_rule_commit",
    "delta_rule_reference",
    "delta_rule_states",
    "delta_rule_states_reference",
    "delta_rule_step",
    "delta_rule_transition",
    "delta_rule_verify",
]
