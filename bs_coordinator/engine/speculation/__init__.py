"""Speculative decoding: several tokens per round of expert requests, without changing what is generated."""

from bs_coordinator.engine.speculation.drafts import Drafter, NgramDrafter
from bs_coordinator.engine.speculation.length import Draft, DraftLength
from bs_coordinator.engine.speculation.mode import DRAFT_MODES, DraftMode, Speculation, load_draft_model

__all__ = [
    "DRAFT_MODES", "Draft", "DraftLength", "DraftMode", "Drafter", "NgramDrafter", "Speculation", "load_draft_model",
]  # fmt: skip
