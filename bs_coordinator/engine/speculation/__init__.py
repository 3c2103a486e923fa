"""Speculative decoding: several tokens per step, without changing what is generated."""

from bs_coordinator.engine.speculation.draft_tree import Proposals
from bs_coordinator.engine.speculation.drafts import Draft, Drafter, NgramDrafter
from bs_coordinator.engine.speculation.length import DraftLength
from bs_coordinator.engine.speculation.mode import Speculation, load_draft_model

__all__ = ["Draft", "DraftLength", "Drafter", "NgramDrafter", "Proposals", "Speculation", "load_draft_model"]
