"""Guesses of what comes next, made on the base station without the experts."""

from collections.abc import Sequence
from typing import Protocol


class Drafter(Protocol):
    """Guesses for one sequence; each drafter belongs to one."""

    def draft(self, ids: Sequence[int], count: int) -> list[int]:
        """Up to `count` token ids that may follow `ids`, the most probable ones; fewer where it does not know."""


class NoDrafter:
    """Plain decoding."""

    def draft(self, ids: Sequence[int], count: int) -> list[int]:
        """None."""
        return []


class NgramDrafter:
    """What followed the last few tokens when they came before: prompt look-up.

    Source: Saxena, "Prompt Lookup Decoding" (2023); the longest n-gram wins, of several the latest.
    """

    def __init__(self, *, longest: int = 4, shortest: int = 2) -> None:
        """Nothing is known yet.

        Args:
            longest, shortest: tokens that must match.
        """
        self._lengths = range(longest, shortest - 1, -1)
        self._after: dict[tuple[int, ...], int] = {}
        self._known: list[int] = []

    def draft(self, ids: Sequence[int], count: int) -> list[int]:
        """See `Drafter`."""
        self._learn(ids)
        for length in self._lengths:
            start = self._after.get(tuple(ids[-length:])) if len(ids) >= length else None
            if start is not None:
                return list(ids[start : start + count])
        return []

    def _learn(self, ids: Sequence[int]) -> None:
        if list(ids[: len(self._known)]) != self._known:
            self._known, self._after = [], {}
        # The n-gram that ends the sequence has no continuation yet.
        for end in range(max(1, len(self._known)), len(ids)):
            for length in self._lengths:
                if end >= length:
                    self._after[tuple(ids[end - length : end])] = end
        self._known = list(ids)
