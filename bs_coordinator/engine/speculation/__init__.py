"""Speculative decoding: several tokens per step, without changing what is generated."""

from bs_coordinator.engine.speculation.drafts import Drafter, NgramDrafter
from bs_coordinator.engine.speculation.length import Draft, DraftLength
from bs_coordinator.engine.speculation.mode import Speculation, load_draft_model

__all__ = ["Draft", "DraftLength", "Drafter", "NgramDrafter", "Speculation", "load_draft_model"]
