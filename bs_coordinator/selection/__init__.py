"""Selection policies: which experts each token is sent to.

A policy is written `name` or `name:option=value,option=value`, on the command line and in plans alike.
"""

from bs_coordinator.selection.policy import Policy
from bs_coordinator.selection.registry import POLICY_NAMES, parse_policy
from bs_coordinator.selection.routing import Routing
from bs_coordinator.selection.topk import TopK

__all__ = ["POLICY_NAMES", "Policy", "Routing", "TopK", "parse_policy"]
