"""How often draft tokens of each kind are accepted, learnt from all sequences together. Pure."""

from collections.abc import Sequence

from bs_coordinator.engine.speculation.drafts import DraftToken

_PRIOR_WEIGHT = 8.0
"""Observations that the prior counts as."""
_MEMORY = 0.99
"""Weight of earlier observations of a kind, for each new one."""


class Acceptance:
    """Accepted share by kind of draft token: a mean of discounted counts and the token's prior."""

    def __init__(self) -> None:
        self._accepted: dict[str, float] = {}
        self._judged: dict[str, float] = {}

    def share(self, token: DraftToken) -> float:
        """Probability that a draft token is accepted if those before it are."""
        judged = self._judged.get(token.kind, 0.0)
        return (self._accepted.get(token.kind, 0.0) + _PRIOR_WEIGHT * token.prior) / (judged + _PRIOR_WEIGHT)

    def observe(self, draft: Sequence[DraftToken], accepted: int, *, instead: int | None = None) -> None:
        """Take in that the first `accepted` tokens of a draft were accepted.

        The first rejected token counts too. The tokens after it do not: they depend on it.

        Args:
            instead: the token that came instead of the first rejected one, if that is known.
        """
        for i, token in enumerate(draft[: accepted + 1]):
            self._judge(token, came=i < accepted)
            if i < accepted or instead is not None:
                for other in token.others:
                    self._judge(other, came=i == accepted and other.id == instead)

    def _judge(self, token: DraftToken, *, came: bool) -> None:
        self._accepted[token.kind] = _MEMORY * self._accepted.get(token.kind, 0.0) + came
        self._judged[token.kind] = _MEMORY * self._judged.get(token.kind, 0.0) + 1.0
