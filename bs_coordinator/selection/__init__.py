"""Selection policies by name.

A policy is written `name` or `name:option=value,option=value`, the same in the command line and in plans.
"""

from bs_coordinator.selection.policy import Policy
from bs_coordinator.selection.registry import POLICY_NAMES, parse_policy
from bs_coordinator.selection.topk import TopK

__all__ = ["POLICY_NAMES", "Policy", "TopK", "parse_policy"]
