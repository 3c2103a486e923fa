"""How often draft tokens of each kind are accepted, learnt from all sequences together. Pure."""

from collections.abc import Mapping, Sequence

from bs_coordinator.engine.speculation.drafts import Choices, DraftToken, Path

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

    def observe(self, choices: Mapping[Path, Choices], chosen: Sequence[int]) -> None:
        """Take in which of the tokens came that were held likely.

        What was held likely after a branch that did not come says nothing: it depends on the branch.

        Args:
            choices: what was held likely, by branch.
            chosen: the tokens that came.
        """
        for i, came in enumerate(chosen):
            for token in choices.get(tuple(chosen[:i]), ()):
                self._judge(token, came=token.id == came)

    def _judge(self, token: DraftToken, *, came: bool) -> None:
        self._accepted[token.kind] = _MEMORY * self._accepted.get(token.kind, 0.0) + came
        self._judged[token.kind] = _MEMORY * self._judged.get(token.kind, 0.0) + 1.0
