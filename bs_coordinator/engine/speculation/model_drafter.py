"""What all drafters that ask a model share: finding the tokens that the model still has to read."""

from bisect import bisect
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from time import perf_counter
from typing import NamedTuple, Protocol

from bs_coordinator.engine.speculation.continuations import Continuations
from bs_coordinator.engine.speculation.drafts import Choices, Draft, DraftToken, Path, Share
from bs_coordinator.engine.speculation.outlook import Outlook
from bs_coordinator.engine.speculation.read_ahead import ReadAhead
from bs_coordinator.engine.speculation.spare_time import SpareTime

MOST_READ = 256
"""Most tokens read at once. Only the end of a longer prompt is read: reading costs a few milliseconds per token that
plain decoding would not spend, and lookups cover what lies further back."""

_EDGES = (0.2, 0.4, 0.6, 0.8, 0.9, 0.96, 0.99)
_EDGES_OF_OTHERS = (0.02, 0.05, 0.1, 0.2, 0.3)
"""Bounds between kinds of draft tokens by the model's own probability. How far to trust it is learnt."""


class Choice(NamedTuple):
    """A token that may come next.

    Attributes:
        id: of the token.
        probability: by the draft model.
    """

    id: int
    probability: float


class Reader(Protocol):
    """A model and one sequence's keys and values.

    Attributes:
        max_positions: number of tokens that it can hold.
    """

    max_positions: int

    def read(self, ids: Sequence[int], past: int) -> list[Choice]:
        """Keep the first `past` tokens, read `ids` after them; the most probable next tokens, best first."""


class ModelDrafter:
    """Proposes what a model finds likely. Tokens that were read once are not read again."""

    def __init__(self, reader: Reader, *, background: Executor | None = None, spare_cores: bool = False) -> None:
        """A drafter that has read nothing.

        Args:
            reader: the model.
            background: where texts are read ahead of time; None if the model must not run beside other work.
            spare_cores: whether the trunk has cores of its own meanwhile.
        """
        self._reader = reader
        self._background = background
        self._spare_cores = spare_cores
        self._reading: Future[object] | None = None
        self._continuations = Continuations()
        self._spare = SpareTime()
        self._first = 0
        self._read: list[int] = []

    def prepare(self, ids: Sequence[int]) -> None:
        """Begin to read the prompt in the background."""
        if self._background is not None:
            self._wait()
            self._reading = self._background.submit(self._next, list(ids))

    def known(self, ids: Sequence[int], path: Path) -> Choices | None:
        """What the model found likely after `ids` and `path`; None if it has not read them."""
        self._continuations.rebase(ids)
        return self._continuations.get(path)

    def find(self, ids: Sequence[int], path: Path) -> Choices:
        """Read `ids` and `path`, unless they were just read in the background."""
        base = list(ids)
        self._continuations.rebase(base)
        self._wait()
        return self._continuations.get(path) or self._read_text(base, path)

    def read_ahead(self, ids: Sequence[int], draft: Draft, share: Share, spare: SpareTime) -> ReadAhead | None:
        """Read what may follow the step in the background; None if there is no background."""
        if (background := self._background) is None:
            return None
        self._wait()
        self._spare = spare
        base, outlook = list(ids), Outlook(draft, share)
        self._continuations.rebase(base)

        def read() -> bool:
            held = tuple(self._read[len(base) - self._first :])
            while (path := outlook.best(held, spare.least_chance)) is not None:
                if (known := self._continuations.get(path)) is None:
                    outlook.read(path, self._read_text(base, path))
                    return True
                outlook.read(path, known)
            return False

        def start(run: Callable[[], None]) -> None:
            self._reading = background.submit(run)

        return ReadAhead(read, start, spare, spare_cores=self._spare_cores)

    def _wait(self) -> None:
        """Wait until only this thread uses the reader."""
        if self._reading is not None:
            reading, self._reading = self._reading, None
            # What has not begun yet may be behind another sequence's prompt, which takes a second.
            if not reading.cancel():
                reading.result()

    def _read_text(self, base: list[int], path: Path) -> Choices:
        text = [*base, *path]
        found = self._next(text)
        choices = tuple(
            DraftToken(id, f"other {bisect(_EDGES_OF_OTHERS, p)}" if rank else f"model {bisect(_EDGES, p)}", p)
            for rank, (id, p) in enumerate(found)
        )
        self._continuations.put(text, choices)
        return choices

    def _next(self, ids: list[int]) -> list[Choice]:
        if len(ids) <= self._first:  # another text, shorter than what was left out of the last one
            self._first = 0
        seen, shared = ids[self._first :], 0
        limit = min(len(self._read), len(seen) - 1)
        while shared < limit and self._read[shared] == seen[shared]:
            shared += 1
        if len(seen) - shared > MOST_READ or len(seen) > self._reader.max_positions:
            self._first = max(0, len(ids) - MOST_READ)
            seen, shared = ids[self._first :], 0
        began_s = perf_counter()
        self._read = seen[:shared]
        choices = self._reader.read(seen[shared:], shared)
        self._read = seen
        if len(seen) - shared == 1:
            self._spare.observe_read(perf_counter() - began_s)
        return choices
