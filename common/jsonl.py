"""Reading JSON that may be damaged, and JSON Lines files, which may end in a line that a crash cut off."""

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from common.files import atomic_write

MAX_LINE_BYTES = 16 << 20
"""Longest line that is read into memory."""
_MOST_DIGITS = 400
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
T = TypeVar("T")


def strict_json(line: bytes) -> Any:
    """The JSON value in a line, as `json.loads`.

    Raises:
        ValueError: not JSON, too deep, a key is given twice, a number is infinite, none or has too many digits, or a
            text is not Unicode because half of a surrogate pair is missing.
    """
    value = finite_json(line, _unique, integer=_integer)
    if _SURROGATE.search(line):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text has half of a surrogate pair, which is not a character") from None
    return value


def finite_json(
    document: bytes | str, pairs: Callable[[list[tuple[str, Any]]], Any], *, integer: Callable[[str], int] = int
) -> Any:  # fmt: skip
    """A JSON value of finite numbers, as `json.loads`.

    Args:
        pairs: makes an object of its keys and values.
        integer: makes an integer of its digits.

    Raises:
        ValueError: not JSON, too deep, a number is infinite or none, or an object or integer is refused.
    """
    try:
        return json.loads(
            document, object_pairs_hook=pairs, parse_constant=_refuse_constant, parse_float=_finite, parse_int=integer
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def decode_json(document: bytes, kind: type[T]) -> T:
    """A document of a type, as `msgspec.json.decode`, in which any fault is an error of the document.

    Raises:
        msgspec.DecodeError: not JSON in UTF-8, nested too deeply, or not of this type.
    """
    try:
        return msgspec.json.decode(document, type=kind)
    except UnicodeDecodeError:
        raise msgspec.DecodeError("not UTF-8") from None
    except RecursionError:
        raise msgspec.DecodeError("nested too deeply") from None


def decode_strict_json(document: bytes, kind: type[T]) -> T:
    """A document of a type, as `decode_json`, in which each key is given once.

    Raises:
        ValueError: as `decode_json` and `strict_json`.
    """
    strict_json(document)
    return decode_json(document, kind)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice[:80]!r} is given twice")
    return found


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a finite number")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:80]} is not a finite number")
    return number


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits is out of range")
    return int(text)


class JsonLinesError(ValueError):
    """A line can't be decoded; the message names file and line."""


def read_json_lines(
    path: Path, decode: Callable[[bytes], T], *, skip_cut: bool = False, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[T]:
    """Yield the decoded lines of a file one by one; blank lines are skipped.

    Args:
        decode: decodes one line, for example `json.loads` or `msgspec.json.Decoder(Item).decode`.
        skip_cut: skip lines whose end is missing, as a crash or a power cut leaves them, instead of raising an error.
        max_line_bytes: longer lines are an error.

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
            except (ValueError, RecursionError) as error:  # msgspec's and json's errors are ValueErrors
                if skip_cut and _is_cut(line):
                    continue
                reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
                raise JsonLinesError(f"{path}, line {number}: {reason}") from None
            yield document


def drop_cut_line(path: Path) -> None:
    """Remove the end of a file that an interruption cut off within a line."""
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        with atomic_write(path) as file:
            file.write(data[: data.rfind(b"\n") + 1])


def _is_cut(line: bytes) -> bool:
    """Whether a line is the beginning of a JSON document; after a power cut, NUL bytes may stand for the rest."""
    begun = line.strip(b"\0\r\n ")
    try:
        json.loads(begun)
    except (ValueError, RecursionError):
        return not begun or any(map(_ends_early, (begun, begun + b"0")))  # a number may end after its point or sign
    return False


def _ends_early(document: bytes) -> bool:
    try:
        decode_json(document, object)
    except msgspec.DecodeError as error:
        return "truncated" in str(error)
    return False
