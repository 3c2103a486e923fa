"""Speculative decoding: several tokens per round of expert requests, without changing what is generated."""

from bs_coordinator.speculation.drafts import Drafter, NgramDrafter, NoDrafter
from bs_coordinator.speculation.length import DraftLength, StepCost

__all__ = ["DraftLength", "Drafter", "NgramDrafter", "NoDrafter", "StepCost"]
