"""Reading JSON Lines files, which may end in a line that a crash cut off."""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

MAX_LINE_BYTES = 16 << 20
"""Longest line that is read into memory."""
T = TypeVar("T")


def strict_json(line: bytes) -> Any:
    """The JSON value in a line, as `json.loads`.

    Raises:
        ValueError: not JSON, too deep, a key is given twice, or a number is infinite or none.
    """
    try:
        return json.loads(line, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:80]!r} is given twice")
    return found


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a number in JSON")


class JsonLinesError(ValueError):
    """A line can't be decoded; the message names file and line."""


def read_json_lines(
    path: Path, decode: Callable[[bytes], T], *, skip_damaged: bool = False, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[T]:
    """Yield the decoded lines of a file one by one; blank lines are skipped.

    Args:
        decode: decodes one line, for example `json.loads` or `msgspec.json.Decoder(Item).decode`.
        skip_damaged: skip lines that don't decode, as a crash leaves them, instead of raising an error.
        max_line_bytes: longer lines count as damaged.

    Raises:
        JsonLinesError: a line is damaged or too long.
        OSError: the file can't be read.
    """
    with path.open("rb") as file:
        for number in itertools.count(1):
            if not (line := file.readline(max_line_bytes + 1)):
                return
            try:
                if len(line) > max_line_bytes and not line.endswith(b"\n"):
                    while (rest := file.readline(max_line_bytes)) and not rest.endswith(b"\n"):
                        pass
                    raise ValueError(f"longer than {max_line_bytes} bytes")
                if not line.strip():
                    continue
                document = decode(line)
            except ValueError as error:  # msgspec's and json's errors are ValueErrors
                if skip_damaged:
                    continue
                raise JsonLinesError(f"{path}, line {number}: {error}") from None
            yield document
