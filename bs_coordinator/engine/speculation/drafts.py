"""Draft tokens: proposals for the next tokens, made on the base station without the experts."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from bs_coordinator.engine.speculation.spare_time import SpareTime
from bs_coordinator.engine.waiting import WaitListener

_NOTHING: Mapping[tuple[int, ...], Any] = MappingProxyType({})


class DraftToken(NamedTuple):
    """A token that may come next, provided that all draft tokens before it are accepted.

    Attributes:
        id: of the token.
        kind: tokens of one kind are accepted about equally often; how often is learnt (`Acceptance`).
        prior: the accepted share to assume before anything was learnt, from 0 to 1.
    """

    id: int
    kind: str
    prior: float


Path = tuple[int, ...]
"""Token ids after the text before a step."""
Choices = tuple[DraftToken, ...]
"""Tokens that may follow a text, best first."""
Share = Callable[[DraftToken], float]
"""Probability that a token comes if those before it do."""


class Draft(NamedTuple):
    """What a step tries.

    Attributes:
        chances: draft tokens by the branch that ends with them, with the probability that it comes. Each follows the
            token before it in its branch, and the likeliest branch is first.
        choices: what was held likely after the branches that the drafter was asked about.
        seconds: time spent drafting.
    """

    chances: Mapping[Path, float] = _NOTHING
    choices: Mapping[Path, Choices] = _NOTHING
    seconds: float = 0.0

    @property
    def ids(self) -> list[int]:
        """Ids of all draft tokens."""
        return [branch[-1] for branch in self.chances]

    @property
    def rows(self) -> dict[Path, int]:
        """The row of each branch's last token, where the token before the draft is row 0."""
        return {branch: row for row, branch in enumerate([Path(), *self.chances])}

    @property
    def parents(self) -> list[int] | None:
        """Parents of the token before the draft and of the draft's, as in `SequenceInput`; None for a single branch."""
        rows = self.rows
        parents = [-1, *(rows[branch[:-1]] for branch in self.chances)]
        return None if parents == list(range(-1, len(self.chances))) else parents


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

    def known(self, ids: Sequence[int], path: Path) -> Choices | None:
        """What may follow `ids` and `path`, empty if there is no proposal; None if finding that takes time."""

    def find(self, ids: Sequence[int], path: Path) -> Choices:
        """The same where it is not known. May take milliseconds."""

    def read_ahead(self, ids: Sequence[int], draft: Draft, share: Share, spare: SpareTime) -> Ahead | None:
        """Prepare the next proposals during a step whose result they depend on.

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

    def read_ahead(self, ids: Sequence[int], draft: Draft, share: Share, spare: SpareTime) -> None:
        """Nothing to prepare either."""

    def known(self, ids: Sequence[int], path: Path) -> Choices:
        """What followed the longest n-gram at the end of the text that occurred before; empty if none did."""
        self._learn(ids)
        end = (*ids[-self._lengths[0] :], *path)
        for length in self._lengths:
            position = self._after.get(end[-length:]) if len(end) >= length else None
            if position is not None:
                return (DraftToken(ids[position], f"{length}-gram", length / (length + 1)),)
        return ()

    def find(self, ids: Sequence[int], path: Path) -> Choices:
        """The same: everything is known."""
        return self.known(ids, path)

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

    def read_ahead(self, ids: Sequence[int], draft: Draft, share: Share, spare: SpareTime) -> Ahead | None:
        """Let the other drafter prepare: it is the one that takes time."""
        return self._other.read_ahead(ids, draft, share, spare)

    def known(self, ids: Sequence[int], path: Path) -> Choices | None:
        """The lookup's token if it is likely, otherwise the other drafter's if it knows some."""
        found = self._lookup.known(ids, path)
        return found if found and self._share(found[0]) >= _LIKELY else self._other.known(ids, path)

    def find(self, ids: Sequence[int], path: Path) -> Choices:
        """The other drafter's: the lookup's would be known."""
        return self._other.find(ids, path)
