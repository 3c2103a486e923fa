"""Link samples as JSON lines, from which the estimates can be replayed."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from bs_coordinator.links.estimator import LinkSample
from common.errors import StorageError
from common.files import append_all
from common.jsonl import decode_json

log = logging.getLogger(__name__)

_NEWLINE = b"\n"
_MAX_LINE_BYTES = 64 << 10


def no_log(sample: LinkSample) -> None:
    """Discard a sample: for a base station without a link log."""


@contextmanager
def link_log(path: Path) -> Iterator[Callable[[LinkSample], None]]:
    """Append samples to a file while the context lasts. If a write fails, warn once and stop logging.

    Raises:
        StorageError: the file can't be opened.
    """
    try:
        _remove_incomplete_line(path)
        file = path.open("ab", buffering=0)
    except OSError as error:
        raise StorageError(f"can't write {path}: {error.strerror}") from error
    encoder = msgspec.json.Encoder()
    full = False

    def write(sample: LinkSample) -> None:
        nonlocal full
        if full:
            return
        try:
            append_all(file.fileno(), encoder.encode(sample) + _NEWLINE)
        except OSError as error:
            full = True
            log.warning("can't write %s: %s; link samples are no longer logged", path, error.strerror)

    with file:
        yield write


def _remove_incomplete_line(path: Path) -> None:
    """Remove the last line of a log if a crash cut it off: the next sample would continue it."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        first = file.readline(_MAX_LINE_BYTES)
        end = file.seek(0, os.SEEK_END)
        begin = file.seek(max(0, end - _MAX_LINE_BYTES))
        complete = begin + file.read().rfind(_NEWLINE) + 1
    if complete == end or complete <= begin:
        return
    try:
        decode_json(first, LinkSample)
    except msgspec.DecodeError:
        return  # it is no link log, so it stays as it is
    os.truncate(path, complete)


class LinkLogReader:
    """Reads a log that may still be growing: each call of `read` returns what is new."""

    def __init__(self, path: Path) -> None:
        """Start at the beginning of the file."""
        self._path = path
        self._offset = self._lines = 0

    def read(self) -> Iterator[LinkSample]:
        """Samples since the last call; an incomplete last line is left for the next call.

        Raises:
            StorageError: the file can't be read, or a line is not a link sample.
        """
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except OSError as error:
            raise StorageError(f"can't read {self._path}: {error.strerror}") from error
        lines = data.split(_NEWLINE)[:-1]
        self._offset += sum(len(line) + 1 for line in lines)
        for line in lines:
            self._lines += 1
            try:
                yield decode_json(line, LinkSample)
            except msgspec.DecodeError as error:
                raise StorageError(f"{self._path}, line {self._lines} is not a link sample: {error}") from None


def read_link_log(path: Path) -> Iterator[LinkSample]:
    """All samples of a log; an incomplete last line, as a crash leaves it, is ignored.

    Raises:
        StorageError: the file can't be read, or a line is not a link sample.
    """
    return LinkLogReader(path).read()
