"""Estimates of what links and nodes can do now, learnt from traffic. Selection policies choose experts by them."""

from bs_coordinator.links.estimator import LinkEstimate, LinkSample
from bs_coordinator.links.monitor import LinkMonitor, NodeEstimate, Probing
from bs_coordinator.links.probes import Probe

__all__ = ["LinkEstimate", "LinkMonitor", "LinkSample", "NodeEstimate", "Probe", "Probing"]
