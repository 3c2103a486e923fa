"""Speculative decoding: several tokens per round of expert requests, without changing what is generated."""

from bs_coordinator.speculation.drafts import Drafter, NgramDrafter
from bs_coordinator.speculation.length import Draft, DraftLength
from bs_coordinator.speculation.mode import DRAFT_MODES, DraftMode, Speculation, load_draft_model

__all__ = [
    "DRAFT_MODES", "Draft", "DraftLength", "DraftMode", "Drafter", "NgramDrafter", "Speculation", "load_draft_model",
]  # fmt: skip
