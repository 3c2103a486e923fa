"""Presets: `--preset fast|exact|field` chooses drafts, wire, policy, local experts and logs.

`look` measures `facts`, `choice` decides by them, and `scores` lists what a choice is known to cost in quality.
"""

from bs_coordinator.presets.choice import Choice, Lever, choose
from bs_coordinator.presets.facts import Facts, Link

__all__ = ["Choice", "Facts", "Lever", "Link", "choose"]
