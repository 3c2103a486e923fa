"""Guesses of what comes next, made on the base station without the experts."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol


class DraftToken(NamedTuple):
    """One token that may come next, given that all guesses before it were right.

    Attributes:
        kind: guesses of one kind are right about equally often; how often is learnt (`Acceptance`).
        prior: the share that is right, before anything was learnt.
    """

    id: int
    kind: str
    prior: float


class Drafter(Protocol):
    """Guesses for one sequence; each drafter belongs to one."""

    def prepare(self, ids: Sequence[int]) -> None:
        """Guesses after these tokens, or some more, will be wanted soon: begin in the background what takes time."""

    def guesses(self, ids: Sequence[int]) -> Iterator[DraftToken]:
        """What may follow `ids`, token by token, each worked out when it is asked for; ends where it does not know."""


class NgramDrafter:
    """What followed the last few tokens when they came before: prompt look-up.

    Source: Saxena, "Prompt Lookup Decoding" (2023); the longest n-gram wins, of several the latest.
    """

    def __init__(self, *, longest: int = 6, shortest: int = 2) -> None:
        """Nothing is known yet.

        Args:
            longest, shortest: tokens that must match.
        """
        self._lengths = range(longest, shortest - 1, -1)
        self._after: dict[tuple[int, ...], int] = {}
        self._known: list[int] = []

    def prepare(self, ids: Sequence[int]) -> None:
        """See `Drafter`."""

    def guesses(self, ids: Sequence[int]) -> Iterator[DraftToken]:
        """See `Drafter`."""
        self._learn(ids)
        for length in self._lengths:
            start = self._after.get(tuple(ids[-length:])) if len(ids) >= length else None
            if start is not None:
                for place in range(start, len(ids)):
                    # Each guess that proves right makes the match longer.
                    matched = min(length + place - start, self._lengths[0])
                    yield DraftToken(ids[place], f"{matched}-gram", matched / (matched + 1))
                return

    def _learn(self, ids: Sequence[int]) -> None:
        if list(ids[: len(self._known)]) != self._known:
            self._known, self._after = [], {}
        # The n-gram that ends the sequence has no continuation yet.
        for end in range(max(1, len(self._known)), len(ids)):
            for length in self._lengths:
                if end >= length:
                    self._after[tuple(ids[end - length : end])] = end
        self._known = list(ids)


_LIKELY = 0.8
"""Share of right guesses from which a look-up is preferred to a draft model, which takes time."""


class FirstOf:
    """A look-up where experience calls its guess likely, else the other drafter; each goes on where it began.

    A look-up costs nothing, a draft model several milliseconds a token, and copies are where look-ups are right.
    """

    def __init__(self, lookup: Drafter, other: Drafter, *, share: Callable[[DraftToken], float]) -> None:
        """Two drafters of one sequence.

        Args:
            share: of guesses like this one that were right.
        """
        self._lookup, self._other, self._share = lookup, other, share

    def prepare(self, ids: Sequence[int]) -> None:
        """See `Drafter`."""
        self._lookup.prepare(ids)
        self._other.prepare(ids)

    def guesses(self, ids: Sequence[int]) -> Iterator[DraftToken]:
        """See `Drafter`."""
        known = list(ids)
        for guess in self._lookup.guesses(ids):
            if self._share(guess) < _LIKELY:
                break
            yield guess
            known.append(guess.id)
        yield from self._other.guesses(known)
