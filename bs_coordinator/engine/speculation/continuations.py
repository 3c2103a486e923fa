"""What a draft model found likely after each of the texts that it has read lately. Pure."""

from collections.abc import Sequence
from threading import Lock

from bs_coordinator.engine.speculation.drafts import Choices, Path


class Continuations:
    """Tokens that may follow a text, for a base text and continuations of it. May be used by two threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._base: list[int] = []
        self._choices: dict[Path, Choices] = {}

    def rebase(self, ids: Sequence[int]) -> None:
        """Make `ids` the base. What continues another text is forgotten."""
        with self._lock:
            old, new = self._base, list(ids)
            if new == old:
                return
            common = min(len(old), len(new))
            kept: dict[Path, Choices] = {}
            if old[:common] == new[:common]:
                added, removed = tuple(old[common:]), tuple(new[common:])
                kept = {
                    (*added, *path[len(removed) :]): choices
                    for path, choices in self._choices.items()
                    if path[: len(removed)] == removed
                }
            self._base, self._choices = new, kept

    def get(self, path: Path) -> Choices | None:
        """What may follow the base and `path`, best first; None if that was not read."""
        with self._lock:
            return self._choices.get(path)

    def put(self, ids: list[int], choices: Choices) -> None:
        """Remember what may follow `ids`, if they continue the base."""
        with self._lock:
            # The other thread may have changed the base while `ids` were read.
            if ids[: len(self._base)] == self._base:
                self._choices[tuple(ids[len(self._base) :])] = choices
