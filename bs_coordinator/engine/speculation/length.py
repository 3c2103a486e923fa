"""How much to draft: as long as the next draft token is expected to bring more than it costs. Pure.

A step with drafts yields one more token for each that is accepted. It takes longer by the time for their rows and for
drafting them (Leviathan et al., arXiv 2211.17192, with the links' round trips as a step's fixed part). Time has a
price, the tokens that a second brings at present, so a draft token is worth its row while

    (probability that it and all before it are accepted) > (seconds it costs) · (tokens per second).

With several sequences in a step a second brings more tokens, which makes drafts shorter.

All these estimates can be wrong. Each sequence therefore keeps an account of the seconds that drafts have saved and
cost it, and may owe only a small share of the time it has taken.
"""

from collections.abc import Callable, Sequence
from time import perf_counter

from bs_coordinator.engine.speculation.acceptance import Acceptance
from bs_coordinator.engine.speculation.cost import StepCost
from bs_coordinator.engine.speculation.draft_tree import Proposals, StoppingRule, grow
from bs_coordinator.engine.speculation.drafts import Choices, Draft, Path
from common.moving_average import MovingAverage

MAX_DRAFT = 15
"""With the token before them, as many rows as the trunk runs with results independent of the batch."""

_OWED_SHARE = 0.02
"""Share of its time that a sequence may lose by drafting …"""
_OWED_STEPS = 0.5
"""… plus this many plain steps."""
_STAKE = 0.5
"""Share of what may still be lost that one draft may cost: after a rejected draft something remains to try again."""
_MAX_SAVED_STEPS = 8.0
"""Most plain steps that the account may be ahead: past success must not pay for endless losses."""
_MAKING_MEMORY = 0.8
_CLEAR_GAIN = 1.5
_PLAIN_EVERY_STEPS, _PLAIN_EVERY_STEPS_CLEAR = 8, 64
"""Steps with drafts between two without, which show what plain decoding costs: while the gain is small, and while
drafting is at least `_CLEAR_GAIN` times as fast."""


class DraftLength:
    """Decides the length of one sequence's drafts."""

    def __init__(self, cost: StepCost, acceptance: Acceptance, *, clock: Callable[[], float] = perf_counter) -> None:
        """A sequence that has neither saved nor lost time.

        Args:
            cost: learnt from the steps of all sequences.
            acceptance: learnt from the drafts of all sequences.
            clock: seconds, for the time spent drafting.
        """
        self._cost, self._acceptance, self._clock = cost, acceptance, clock
        self._making_s = MovingAverage(_MAKING_MEMORY)
        self._saved_s = 0.0
        self._taken_s = 0.0

    def draft(self, proposals: Proposals, longest: int, *, sequences: int = 1, branching: bool = False) -> Draft:
        """Take proposed tokens while they are worth their cost.

        Args:
            proposals: of the drafter.
            longest: tokens of a branch at most.
            sequences: number of sequences that will share the step.
            branching: whether the step may try several tokens for one position.
        """
        if longest < 1 or not self._cost.known:
            return Draft()
        price = self._cost.tokens_per_s(sequences)
        if self._must_measure_plain(price, sequences):
            return Draft()
        began_s = self._clock()

        def find(branch: Path) -> Choices:
            asked_s = self._clock()
            choices = proposals.find(branch)
            # A sequence's first draft token may include reading a whole prompt: the next one will not take as long.
            if branch or self._taken_s > 0.0:
                self._making_s.add(self._clock() - asked_s)
            return choices

        rule = StoppingRule(price, self._cost.row_s, self._making_s.value, self._most(sequences), longest)
        draft = grow(proposals._replace(find=find), self._acceptance.share, rule, branching=branching)
        return draft._replace(seconds=self._clock() - began_s)

    def observe(self, draft: Draft, chosen: Sequence[int], step_s: float, *, rows: int, sequences: int = 1) -> None:
        """Take in the result of a draft, perhaps an empty one. Call this before `StepCost.observe` for the same step.

        Args:
            draft: as `draft` returned it.
            chosen: the tokens that the step yielded: accepted draft tokens, then one more.
            step_s: duration of the step, without the time spent drafting.
            rows: of the step, of all sequences.
            sequences: number of sequences that shared the step.
        """
        self._acceptance.observe(draft.choices, chosen)
        plain_s = self._cost.plain_s(sequences)
        self._taken_s += step_s / sequences + draft.seconds
        if draft.chances:
            # Measured, not expected: an account of expectations could not show that they are wrong.
            self._saved_s -= len(draft.chances) * (step_s - self._cost.seconds(sequences)) / (rows - sequences)
        self._saved_s += (len(chosen) - 1) * plain_s - draft.seconds
        self._saved_s = min(self._saved_s, _MAX_SAVED_STEPS * plain_s)

    def _must_measure_plain(self, price: float, sequences: int) -> bool:
        """Whether this step should go without a draft: otherwise it would soon be unknown whether drafting pays."""
        gain = price * self._cost.plain_s(sequences)
        return self._cost.since_plain >= (_PLAIN_EVERY_STEPS if gain < _CLEAR_GAIN else _PLAIN_EVERY_STEPS_CLEAR)

    def _most(self, sequences: int) -> int:
        """Most tokens of the next draft, by what the trunk takes and by what the sequence may still lose."""
        may_owe_s = _OWED_SHARE * self._taken_s + _OWED_STEPS * self._cost.plain_s(sequences)
        may_lose_s = max(0.0, self._saved_s + may_owe_s)
        affordable = _STAKE * may_lose_s / max(self._cost.row_s + self._making_s.value, 1e-9)
        # The cost of many rows is unknown until a few were tried.
        return min(MAX_DRAFT, 2 * self._cost.widest + 1, int(affordable))
