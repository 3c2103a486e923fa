"""Experts that the base station keeps itself, within a memory budget (`bs_coordinator.dispatch.local_node`).

`traffic` counts which experts tokens are sent to together, `choice` decides from that which to keep, and `experts`
keeps and computes them.
"""

from bs_coordinator.resident.experts import ResidentExperts
from bs_coordinator.resident.traffic import Traffic, read_traffic, traffic_of_log

__all__ = ["ResidentExperts", "Traffic", "read_traffic", "traffic_of_log"]
