"""What every parser here returns, and helpers for reading lines of `name: value`."""

import re
from collections.abc import Mapping
from typing import Generic, NamedTuple, TypeVar

_T = TypeVar("_T")


class Parsed(NamedTuple, Generic[_T]):
    """Facts from one output.

    Attributes:
        facts: what was understood; the rest is None.
        complaint: what was not understood, for one warning; empty if everything was.
    """

    facts: _T
    complaint: str = ""


class Fields:
    """Lines of `name: value`, read with patterns that the values must match.

    Attributes:
        complaint: the first value that did not match; empty if all did.
    """

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = values
        self.complaint = ""

    def number(self, name: str, pattern: str = r"(-?\d+)") -> float | None:
        """The number in group 1 of `pattern`, matched at the beginning of a value.

        None if there is no such line, or if its value does not match, which is a complaint.
        """
        value = self._values.get(name)
        if value is None:
            return None
        match = re.match(pattern, value)
        if match is None:
            self.complain(f"{name}: {value}")
            return None
        return float(match[1])

    def integer(self, name: str, pattern: str = r"(-?\d{1,15})\b") -> int | None:
        """The whole number in group 1 of `pattern`, as `number`."""
        number = self.number(name, pattern)
        return None if number is None else int(number)

    def complain(self, what: str) -> None:
        """Keep the first text that was not understood."""
        self.complaint = self.complaint or f"not understood: {what[:80]!r}"


def lines_of(text: str) -> dict[str, str]:
    """Values of `name: value` lines by name, both stripped; the first counts if a name is repeated.

    A last line without a line break is left out: it may have been cut off within a number.
    """
    found: dict[str, str] = {}
    for line in text[: text.rfind("\n") + 1].splitlines():
        name, colon, value = line.partition(":")
        if colon:
            found.setdefault(name.strip(), value.strip())
    return found


def is_cut(text: str) -> bool:
    """Whether an output was cut off within a line."""
    return not text.endswith("\n")
