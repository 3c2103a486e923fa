"""What all drafters that ask a model share: finding the tokens that the model still has to read."""

from bisect import bisect
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from typing import Protocol

from bs_coordinator.engine.speculation.drafts import DraftToken

MOST_READ = 256
"""Most tokens read at once. Only the end of a longer prompt is read: reading costs a few milliseconds per token that
plain decoding would not spend, and lookups cover what lies further back."""

_EDGES = (0.2, 0.4, 0.6, 0.8, 0.9, 0.96, 0.99)
"""Bounds between kinds of draft tokens by the model's own probability. How far to trust it is learnt."""


class Reader(Protocol):
    """A model and one sequence's keys and values.

    Attributes:
        max_positions: number of tokens that it can hold.
    """

    max_positions: int

    def read(self, ids: Sequence[int], past: int) -> tuple[int, float]:
        """Keep the first `past` tokens, read `ids` after them; the most probable next token and its probability."""


class ModelDrafter:
    """Proposes a model's greedy continuation. Tokens that were read once are not read again."""

    def __init__(self, reader: Reader, *, background: Executor | None = None) -> None:
        """A drafter that has read nothing.

        Args:
            reader: the model.
            background: where prompts are read ahead of time; None if the model must not run beside other work.
        """
        self._reader = reader
        self._background = background
        self._reading: Future[object] | None = None
        self._first = 0
        self._read: list[int] = []

    def prepare(self, ids: Sequence[int]) -> None:
        """Begin to read the prompt in the background."""
        if self._background is not None:
            self._wait()
            self._reading = self._background.submit(self._next, list(ids))

    def propose(self, ids: Sequence[int]) -> Iterator[DraftToken]:
        """The model's greedy continuation of `ids`; never ends."""
        self._wait()
        known = list(ids)
        while True:
            id, probability = self._next(known)
            yield DraftToken(id, f"model {bisect(_EDGES, probability)}", probability)
            known.append(id)

    def _wait(self) -> None:
        """Wait until only this thread uses the reader."""
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
