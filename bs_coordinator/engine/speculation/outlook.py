"""Which texts a draft model should read before it is known how a step ends. Pure.

A step accepts a branch of its draft up to some token and adds one token of its own. The text after it therefore begins
with a whole branch, or is a part of one with another token at the end. Each such text, and each continuation of it, has
a probability: the product of the probabilities that its tokens come. Reading a text tells which tokens may follow it.
"""

from collections.abc import Sequence

from bs_coordinator.engine.speculation.drafts import Draft, DraftToken, Path, Share

_FURTHER_TOKEN = 0.15
"""Time for each further token that is read at once, as a share of the time for one: weights are read once for all."""
_LEAST_CHANCE = 0.02


class Outlook:
    """Texts that are worth reading, as a tree that grows with what is read."""

    def __init__(self, draft: Draft, share: Share) -> None:
        """The ends that a step with this draft may have.

        Args:
            draft: what the step verifies, with what else the drafter holds likely.
            share: probability that a token comes, if those before it do.
        """
        self._share = share
        self._chances: dict[Path, float] = {}
        for branch, chance in {Path(): 1.0, **draft.chances}.items():
            if (choices := draft.choices.get(branch)) is None:
                self._chances[branch] = chance
            else:
                self._add(branch, [t for t in choices if (*branch, t.id) not in draft.chances], chance)

    def best(self, held: Path, least: float) -> Path | None:
        """The text whose reading is worth the most for its time; None if there is none.

        Args:
            held: what was read last. A text that has the beginning in common with it takes less reading.
            least: the probability from which a text is worth reading.
        """
        worth = {
            path: chance / (1.0 + _FURTHER_TOKEN * (len(path) - _common(path, held) - 1))
            for path, chance in self._chances.items()
            if chance >= max(least, _LEAST_CHANCE)
        }
        return max(worth, key=worth.__getitem__, default=None)

    def read(self, path: Path, choices: Sequence[DraftToken]) -> None:
        """Take in which tokens may follow a text, which is not proposed again."""
        self._add(path, choices, self._chances.pop(path))

    def _add(self, path: Path, choices: Sequence[DraftToken], chance: float) -> None:
        for token in choices:
            self._chances[(*path, token.id)] = chance * self._share(token)


def _common(one: Path, other: Path) -> int:
    """Length of the common beginning; at least the last token of `one` has to be read again."""
    length = 0
    for a, b in zip(one[:-1], other, strict=False):
        if a != b:
            break
        length += 1
    return length
