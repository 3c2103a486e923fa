"""What the links and nodes can do now, learnt from traffic: the measured half of the choice of experts."""

from bs_coordinator.links.estimator import LinkEstimate, LinkSample
from bs_coordinator.links.monitor import LinkMonitor, NodeEstimate, Probe

__all__ = ["LinkEstimate", "LinkMonitor", "LinkSample", "NodeEstimate", "Probe"]
