"""How far to draft: for as long as a guess is expected to bring more than its cost. Pure.

A step with drafts yields one token more for each that is accepted, and takes longer by what their rows and the making
of them cost (Leviathan et al., arXiv 2211.17192, with the link's round trips as a step's fixed part). Time has a price,
the tokens that a second brings at present; a guess is worth its row while

    (chance that it and all before it are right) > (seconds it costs) · (tokens per second).

With several sequences in a step a second brings more tokens, so that drafts become shorter by themselves.

What all estimates have in common is that they can be wrong. So each sequence keeps an account of the seconds that
drafts have saved it and cost it, and may owe no more than a small share of the time that it has taken.
"""

from collections.abc import Callable, Iterator
from time import perf_counter
from typing import NamedTuple

from bs_coordinator.engine.speculation.acceptance import Acceptance
from bs_coordinator.engine.speculation.cost import StepCost
from bs_coordinator.engine.speculation.drafts import DraftToken

MAX_DRAFT = 15
"""With the token before them, as many rows as the trunk runs as if each were alone."""

_OWED_SHARE = 0.02
_OWED_STEPS = 0.5
_STAKE = 0.5
_MOST_SAVED_STEPS = 8.0
_MAKING_MEMORY = 0.8
_LOOK_STEPS = 8
_CLEAR_GAIN = 1.5
_CLEAR_GAIN_LOOK_STEPS = 64


class Draft(NamedTuple):
    """What is tried in a step.

    Attributes:
        guesses: in the order of the sequence.
        seconds: that making them took.
    """

    guesses: tuple[DraftToken, ...] = ()
    seconds: float = 0.0


class DraftLength:
    """Decides for one sequence."""

    def __init__(self, cost: StepCost, acceptance: Acceptance, *, clock: Callable[[], float] = perf_counter) -> None:
        """Nothing is owed yet.

        Args:
            cost, acceptance: learnt by all sequences together.
        """
        self._cost, self._acceptance, self._clock = cost, acceptance, clock
        self._making_s = 0.0
        self._saved_s = 0.0
        self._taken_s = 0.0

    def draft(self, guesses: Iterator[DraftToken], most: int, *, sequences: int = 1) -> Draft:
        """Take guesses while they are worth it.

        Args:
            most: guesses.
            sequences: that will share the step.
        """
        if most < 1 or not self._cost.known:
            return Draft()
        price = self._cost.tokens_per_s(sequences)
        # Whether drafting pays is not known for long without a look at what plain decoding takes.
        gain = price * self._cost.plain_s(sequences)
        if self._cost.since_plain >= (_LOOK_STEPS if gain < _CLEAR_GAIN else _CLEAR_GAIN_LOOK_STEPS):
            return Draft()
        began = self._clock()
        row_s = self._cost.row_s
        taken: list[DraftToken] = []
        chance = 1.0
        # Half of what may still be lost: so that after a bad guess there is something left to try again with.
        affordable = _STAKE * self._may_lose_s(sequences) / max(row_s + self._making_s, 1e-9)
        # What many rows cost is not known before a few were tried.
        most = min(most, MAX_DRAFT, 2 * self._cost.widest + 1, int(affordable))
        while len(taken) < most and chance > price * (row_s + self._making_s):
            asked = self._clock()
            guess = next(guesses, None)
            if guess is None:
                break
            # The first guess may have to read a whole prompt: that is not what the next one will take.
            if taken or self._taken_s > 0.0:
                making_s = self._clock() - asked
                self._making_s = _MAKING_MEMORY * self._making_s + (1 - _MAKING_MEMORY) * making_s
            chance *= self._acceptance.share(guess)
            if chance <= price * row_s:
                break
            taken.append(guess)
        return Draft(tuple(taken), self._clock() - began)

    def observe(self, draft: Draft, accepted: int, step_s: float, *, rows: int, sequences: int = 1) -> None:
        """Take in what became of a draft, perhaps an empty one; before `StepCost` takes in the step.

        Args:
            step_s: what the step took, with the making of drafts left out.
            rows: of the step, of all sequences.
        """
        self._acceptance.observe(draft.guesses, accepted)
        plain_s = self._cost.plain_s(sequences)
        self._taken_s += step_s / sequences + draft.seconds
        if draft.guesses:
            # What was measured, not what was expected: an account of expectations could not show that they are wrong.
            self._saved_s -= len(draft.guesses) * (step_s - self._cost.seconds(sequences)) / (rows - sequences)
        self._saved_s += accepted * plain_s - draft.seconds
        # A good beginning does not pay for an endless bad time.
        self._saved_s = min(self._saved_s, _MOST_SAVED_STEPS * plain_s)

    def _may_lose_s(self, sequences: int) -> float:
        may_owe_s = _OWED_SHARE * self._taken_s + _OWED_STEPS * self._cost.plain_s(sequences)
        return max(0.0, self._saved_s + may_owe_s)
