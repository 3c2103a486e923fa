"""Draft tokens: proposals for the next tokens, made on the base station without the experts."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from bs_coordinator.engine.speculation.spare_time import SpareTime
from bs_coordinator.engine.waiting import WaitListener


class DraftToken(NamedTuple):
    """A token that may come next, provided that all draft tokens before it are accepted.

    Attributes:
        id: of the token.
        kind: tokens of one kind are accepted about equally often; how often is learnt (`Acceptance`).
        prior: the accepted share to assume before anything was learnt, from 0 to 1.
        others: what the drafter holds likely in its place, best first.
    """

    id: int
    kind: str
    prior: float
    others: "tuple[DraftToken, ...]" = ()


Share = Callable[[DraftToken], float]
"""Probability that a token comes if those before it do."""


class Ahead(WaitListener, Protocol):
    """Prepares proposals during the waits of one step.

    Attributes:
        reads: number of texts that the draft model has read.
    """

    reads: int


class Drafter(Protocol):
    """Proposes tokens for one sequence; each sequence has its own drafter."""

    def prepare(self, ids: Sequence[int]) -> None:
        """Announce that proposals after these token ids, or a continuation of them, will be needed soon.

        Slow preparations begin in the background.
        """

    def propose(self, ids: Sequence[int]) -> Iterator[DraftToken]:
        """Tokens that may follow `ids`, each computed when it is requested; ends where there is no proposal."""

    def read_ahead(
        self, ids: Sequence[int], draft: Sequence[DraftToken], share: Share, spare: SpareTime
    ) -> Ahead | None:
        """Prepare the next proposals during a step whose result they depend on, while answers of nodes are awaited.

        Args:
            ids: before the step.
            draft: what the step verifies.
            share: probability that a token comes.
            spare: when that pays.

        Returns:
            What has to be told about the waits of the step; None if nothing can be prepared.
        """


class NgramDrafter:
    """Proposes what followed the last few tokens when they occurred before (prompt lookup).

    Source: Saxena, "Prompt Lookup Decoding" (2023). The longest matching n-gram is used, at its latest occurrence.
    """

    def __init__(self, *, longest: int = 6, shortest: int = 2) -> None:
        """An empty index.

        Args:
            longest: most tokens that are matched.
            shortest: fewest tokens that must match.
        """
        self._lengths = range(longest, shortest - 1, -1)
        self._after: dict[tuple[int, ...], int] = {}
        self._known: list[int] = []

    def prepare(self, ids: Sequence[int]) -> None:
        """Nothing to prepare: a lookup takes microseconds."""

    def read_ahead(self, ids: Sequence[int], draft: Sequence[DraftToken], share: Share, spare: SpareTime) -> None:
        """Nothing to prepare either."""

    def propose(self, ids: Sequence[int]) -> Iterator[DraftToken]:
        """What followed the longest n-gram of `ids` that occurred before."""
        self._learn(ids)
        for length in self._lengths:
            start = self._after.get(tuple(ids[-length:])) if len(ids) >= length else None
            if start is not None:
                for position in range(start, len(ids)):
                    # Each accepted token makes the match one token longer.
                    matched = min(length + position - start, self._lengths[0])
                    yield DraftToken(ids[position], f"{matched}-gram", matched / (matched + 1))
                return

    def _learn(self, ids: Sequence[int]) -> None:
        if list(ids[: len(self._known)]) != self._known:
            self._known, self._after = [], {}
        # The n-gram at the end of the sequence has no continuation yet.
        for end in range(max(1, len(self._known)), len(ids)):
            for length in self._lengths:
                if end >= length:
                    self._after[tuple(ids[end - length : end])] = end
        self._known = list(ids)


_LIKELY = 0.8
"""Accepted share from which a lookup is preferred to a draft model, which takes time."""


class FirstOf:
    """Proposes by lookup while its tokens are likely to be accepted, and continues with another drafter.

    A lookup costs nothing and a draft model several milliseconds per token. Lookups are right where text is copied.
    """

    def __init__(self, lookup: Drafter, other: Drafter, *, share: Share) -> None:
        """Combine two drafters of one sequence.

        Args:
            lookup: the preferred drafter.
            other: used where the lookup has no likely token.
            share: accepted share of tokens like a given one, from 0 to 1.
        """
        self._lookup, self._other, self._share = lookup, other, share

    def prepare(self, ids: Sequence[int]) -> None:
        """Prepare both drafters."""
        self._lookup.prepare(ids)
        self._other.prepare(ids)

    def read_ahead(
        self, ids: Sequence[int], draft: Sequence[DraftToken], share: Share, spare: SpareTime
    ) -> Ahead | None:
        """Let the other drafter prepare: it is the one that takes time."""
        return self._other.read_ahead(ids, draft, share, spare)

    def propose(self, ids: Sequence[int]) -> Iterator[DraftToken]:
        """The lookup's tokens while they are likely, then the other drafter's."""
        known = list(ids)
        for token in self._lookup.propose(ids):
            if self._share(token) < _LIKELY:
                break
            yield token
            known.append(token.id)
        yield from self._other.propose(known)
