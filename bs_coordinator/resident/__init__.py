"""Experts that the base station keeps itself, within a memory budget: holders without a link.

`traffic` counts which experts tokens are sent to together, `choice` decides from it which to keep, `experts` keeps and
computes them, `holder` answers the dispatcher's requests with them.
"""

from bs_coordinator.resident.experts import Computed, ResidentExperts
from bs_coordinator.resident.holder import ResidentHolder
from bs_coordinator.resident.traffic import Traffic, read_traffic, traffic_of_log

__all__ = ["Computed", "ResidentExperts", "ResidentHolder", "Traffic", "read_traffic", "traffic_of_log"]
