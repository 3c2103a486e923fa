"""What every parser here returns, and how it takes what a device says."""

import re
from collections.abc import Mapping
from typing import Generic, NamedTuple, TypeVar

_T = TypeVar("_T")


class Parsed(NamedTuple, Generic[_T]):
    """Facts from one output.

    Attributes:
        facts: what was understood; the rest is None.
        complaint: what was not understood, for one warning; empty when all was.
    """

    facts: _T
    complaint: str = ""


class Fields:
    """Lines of `name: value`, each with what its value must look like."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = values
        self.complaint = ""

    def number(self, name: str, pattern: str = r"(-?\d+)") -> float | None:
        """The number that `pattern`'s group 1 finds at the beginning of a value; None where it is missing or no
        number, which is complained of."""
        value = self._values.get(name)
        if value is None:
            return None
        match = re.match(pattern, value)
        if match is None:
            self.complain(f"{name}: {value}")
            return None
        return float(match[1])

    def integer(self, name: str, pattern: str = r"(-?\d{1,15})\b") -> int | None:
        """The same for whole numbers."""
        number = self.number(name, pattern)
        return None if number is None else int(number)

    def complain(self, what: str) -> None:
        """Remember the first thing that was not understood."""
        self.complaint = self.complaint or f"not understood: {what[:80]!r}"


def lines_of(text: str) -> dict[str, str]:
    """`name: value` lines by name, without white space around either; of equal names the first. A last line that is
    cut off is left out: a part of a number is another number."""
    found: dict[str, str] = {}
    for line in text[: text.rfind("\n") + 1].splitlines():
        name, colon, value = line.partition(":")
        if colon:
            found.setdefault(name.strip(), value.strip())
    return found


def is_cut(text: str) -> bool:
    """Whether an output ends within a line."""
    return not text.endswith("\n")
