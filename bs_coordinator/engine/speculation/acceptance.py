"""How often guesses of each kind prove right, learnt from all sequences together. Pure."""

from collections.abc import Sequence

from bs_coordinator.engine.speculation.drafts import DraftToken

_PRIOR_WEIGHT = 8.0
"""Guesses that the prior counts as."""
_MEMORY = 0.99


class Acceptance:
    """Shares by kind of guess: a mean over those that were judged, recent ones first, and the prior."""

    def __init__(self) -> None:
        self._right: dict[str, float] = {}
        self._judged: dict[str, float] = {}

    def share(self, guess: DraftToken) -> float:
        """The chance that a guess is right if those before it are."""
        judged = self._judged.get(guess.kind, 0.0)
        return (self._right.get(guess.kind, 0.0) + _PRIOR_WEIGHT * guess.prior) / (judged + _PRIOR_WEIGHT)

    def observe(self, draft: Sequence[DraftToken], accepted: int) -> None:
        """Take in that the first `accepted` guesses were right; after the first wrong one, none was judged."""
        for i, guess in enumerate(draft[: accepted + 1]):
            self._right[guess.kind] = _MEMORY * self._right.get(guess.kind, 0.0) + (i < accepted)
            self._judged[guess.kind] = _MEMORY * self._judged.get(guess.kind, 0.0) + 1.0
