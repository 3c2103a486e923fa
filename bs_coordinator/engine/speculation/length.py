"""How far to draft: as long as the next draft token is expected to bring more than it costs. Pure.

A step with drafts yields one more token for each that is accepted. It takes longer by the time for their rows and for
drafting them (Leviathan et al., arXiv 2211.17192, with the links' round trips as a step's fixed part). Time has a
price, the tokens that a second brings at present, so a draft token is worth its row while

    (probability that it and all before it are accepted) > (seconds it costs) · (tokens per second).

With several sequences in a step a second brings more tokens, which makes drafts shorter.

All these estimates can be wrong. Each sequence therefore keeps an account of the seconds that drafts have saved and
cost it, and may owe only a small share of the time it has taken.
"""

from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import NamedTuple

from bs_coordinator.engine.speculation.acceptance import Acceptance
from bs_coordinator.engine.speculation.cost import StepCost
from bs_coordinator.engine.speculation.drafts import DraftToken
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


class Draft(NamedTuple):
    """What a step tries.

    Attributes:
        tokens: in the order of the sequence.
        seconds: time spent drafting.
        others: further tokens, each in place of the one with that index in `tokens`.
    """

    tokens: tuple[DraftToken, ...] = ()
    seconds: float = 0.0
    others: tuple[tuple[int, DraftToken], ...] = ()

    @property
    def ids(self) -> list[int]:
        """Ids of all draft tokens, the others last."""
        return [token.id for token in self.tokens] + [token.id for _, token in self.others]

    @property
    def parents(self) -> list[int] | None:
        """Parents of the token before the draft and of the draft's, as in `SequenceInput`; None without others."""
        if not self.others:
            return None
        return [*range(-1, len(self.tokens)), *(index for index, _ in self.others)]

    @property
    def rows(self) -> dict[tuple[int, int], int]:
        """For each of `others`, by index and id, its row in the step, where the token before the draft is row 0."""
        first = 1 + len(self.tokens)
        return {(index, token.id): first + i for i, (index, token) in enumerate(self.others)}


class StoppingRule(NamedTuple):
    """When a draft is long enough.

    Attributes:
        price: tokens that a second brings.
        row_s: seconds that one more row adds to the step.
        most: limit of the draft's length.
    """

    price: float
    row_s: float
    most: int

    def continues(self, length: int, chance: float, making_s: float) -> bool:
        """Whether to request another token for a draft of `length` tokens.

        Args:
            length: of the draft so far.
            chance: probability that all tokens of the draft are accepted.
            making_s: expected time to draft one more.
        """
        return length < self.most and chance > self.price * (self.row_s + making_s)

    def takes(self, chance: float) -> bool:
        """Whether a token is worth its row, given the probability that it and all before it are accepted."""
        return chance > self.price * self.row_s


def likely_others(
    draft: Sequence[DraftToken], share: Callable[[DraftToken], float], rule: StoppingRule
) -> tuple[tuple[int, DraftToken], ...]:
    """Tokens that are worth a row in place of a draft token, each with that one's index, the likeliest first.

    If such a token comes, the step yields it and the token after it, as if it had been drafted.
    """
    found, chance = [], 1.0
    for index, token in enumerate(draft):
        found += [(chance * share(other), index, other) for other in token.others]
        chance *= share(token)
    found.sort(key=lambda each: -each[0])
    return tuple((index, other) for chance, index, other in found[: rule.most - len(draft)] if rule.takes(chance))


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

    def draft(self, proposed: Iterator[DraftToken], most: int, *, sequences: int = 1, branching: bool = False) -> Draft:
        """Take proposed tokens while they are worth their cost.

        Args:
            proposed: by the drafter, each computed when it is requested.
            most: limit of the draft's length.
            sequences: number of sequences that will share the step.
            branching: whether the step may also try other tokens in place of draft tokens.
        """
        if most < 1 or not self._cost.known:
            return Draft()
        price = self._cost.tokens_per_s(sequences)
        if self._must_measure_plain(price, sequences):
            return Draft()
        began_s = self._clock()
        rule = StoppingRule(price, self._cost.row_s, self._limit(most, sequences))
        taken: list[DraftToken] = []
        chance = 1.0
        while rule.continues(len(taken), chance, self._making_s.value):
            asked_s = self._clock()
            token = next(proposed, None)
            if token is None:
                break
            # A sequence's first draft token may include reading a whole prompt: the next one will not take as long.
            if taken or self._taken_s > 0.0:
                self._making_s.add(self._clock() - asked_s)
            chance *= self._acceptance.share(token)
            if not rule.takes(chance):
                break
            taken.append(token)
        others = likely_others(taken, self._acceptance.share, rule) if branching else ()
        return Draft(tuple(taken), self._clock() - began_s, others)

    def observe(
        self, draft: Draft, accepted: int, step_s: float, *, rows: int, sequences: int = 1, instead: int | None = None
    ) -> None:
        """Take in the result of a draft, perhaps an empty one. Call this before `StepCost.observe` for the same step.

        Args:
            draft: as `draft` returned it.
            accepted: number of its tokens that were accepted, without `others`.
            step_s: duration of the step, without the time spent drafting.
            rows: of the step, of all sequences.
            sequences: number of sequences that shared the step.
            instead: the token that came after the accepted ones.
        """
        self._acceptance.observe(draft.tokens, accepted, instead=instead)
        if instead is not None and (accepted, instead) in draft.rows:
            accepted += 1
        plain_s = self._cost.plain_s(sequences)
        self._taken_s += step_s / sequences + draft.seconds
        if draft.tokens:
            # Measured, not expected: an account of expectations could not show that they are wrong.
            self._saved_s -= len(draft.ids) * (step_s - self._cost.seconds(sequences)) / (rows - sequences)
        self._saved_s += accepted * plain_s - draft.seconds
        self._saved_s = min(self._saved_s, _MAX_SAVED_STEPS * plain_s)

    def _must_measure_plain(self, price: float, sequences: int) -> bool:
        """Whether this step should go without a draft: otherwise it would soon be unknown whether drafting pays."""
        gain = price * self._cost.plain_s(sequences)
        return self._cost.since_plain >= (_PLAIN_EVERY_STEPS if gain < _CLEAR_GAIN else _PLAIN_EVERY_STEPS_CLEAR)

    def _limit(self, most: int, sequences: int) -> int:
        """Most tokens of the next draft, by its limits and by what the sequence may still lose."""
        may_owe_s = _OWED_SHARE * self._taken_s + _OWED_STEPS * self._cost.plain_s(sequences)
        may_lose_s = max(0.0, self._saved_s + may_owe_s)
        affordable = _STAKE * may_lose_s / max(self._cost.row_s + self._making_s.value, 1e-9)
        # The cost of many rows is unknown until a few were tried.
        return min(most, MAX_DRAFT, 2 * self._cost.widest + 1, int(affordable))
