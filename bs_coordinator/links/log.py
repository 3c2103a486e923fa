"""Link samples as JSON lines, from which the estimates can be replayed."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from bs_coordinator.links.estimator import LinkSample
from common.errors import StorageError

log = logging.getLogger(__name__)

_NEWLINE = b"\n"


def no_log(sample: LinkSample) -> None:
    """Discard a sample: for a base station without a link log."""


@contextmanager
def link_log(path: Path) -> Iterator[Callable[[LinkSample], None]]:
    """Append samples to a file while the context lasts. If a write fails, warn once and stop logging.

    Raises:
        StorageError: the file can't be opened.
    """
    try:
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
            file.write(encoder.encode(sample) + _NEWLINE)
        except OSError as error:
            full = True
            log.warning("can't write %s: %s; no more link samples are logged", path, error.strerror)

    with file:
        yield write


class LinkLogReader:
    """Reads a log that may still be growing: each call of `read` returns what is new."""

    def __init__(self, path: Path) -> None:
        """Start at the beginning of the file."""
        self._path = path
        self._offset = self._lines = 0
        self._decoder = msgspec.json.Decoder(LinkSample)

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
                yield self._decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise StorageError(f"{self._path}, line {self._lines} is not a link sample: {error}") from None


def read_link_log(path: Path) -> Iterator[LinkSample]:
    """All samples of a log; an incomplete last line, as a crash leaves it, is ignored.

    Raises:
        StorageError: the file can't be read, or a line is not a link sample.
    """
    return LinkLogReader(path).read()
