"""What drafters that ask a model have in common: which tokens the model still has to read."""

from bisect import bisect
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from typing import Protocol

from bs_coordinator.engine.speculation.drafts import DraftToken

MOST_READ = 256
"""Tokens read at once at most. Of a longer prompt only the end is read: reading costs a few milliseconds a token, which
plain decoding would not have taken, and what lies far back is what look-ups are for."""

_EDGES = (0.2, 0.4, 0.6, 0.8, 0.9, 0.96, 0.99)
"""A model's own probabilities as kinds of guesses: whether they are to be believed is learnt."""


class Reader(Protocol):
    """A model and its keys and values of one sequence.

    Attributes:
        max_positions: tokens that it can hold.
    """

    max_positions: int

    def read(self, ids: Sequence[int], past: int) -> tuple[int, float]:
        """Read tokens, forgetting all but the `past` first ones before; the most probable next token and how
        probable it is."""


class ModelDrafter:
    """Greedy continuations; what was read once is not read again."""

    def __init__(self, reader: Reader, *, background: Executor | None = None) -> None:
        """Nothing is read yet.

        Args:
            background: where prompts are read that are not needed yet; None for a model that may not run beside others.
        """
        self._reader = reader
        self._background = background
        self._reading: Future[object] | None = None
        self._first = 0
        self._read: list[int] = []

    def prepare(self, ids: Sequence[int]) -> None:
        """See `Drafter`."""
        if self._background is not None:
            self._wait()
            self._reading = self._background.submit(self._next, list(ids))

    def guesses(self, ids: Sequence[int]) -> Iterator[DraftToken]:
        """See `Drafter`."""
        self._wait()
        known = list(ids)
        while True:
            id, probability = self._next(known)
            yield DraftToken(id, f"model {bisect(_EDGES, probability)}", probability)
            known.append(id)

    def _wait(self) -> None:
        """Until nothing but this thread uses the reader."""
        if self._reading is not None:
            reading, self._reading = self._reading, None
            reading.result()

    def _next(self, ids: list[int]) -> tuple[int, float]:
        seen, shared = ids[self._first :], 0
        limit = min(len(self._read), len(seen) - 1)
        while shared < limit and self._read[shared] == seen[shared]:
            shared += 1
        if len(seen) - shared > MOST_READ or len(seen) > self._reader.max_positions:
            self._first = max(0, len(ids) - MOST_READ)
            seen, shared = ids[self._first :], 0
        self._read = seen
        return self._reader.read(seen[shared:], shared)
