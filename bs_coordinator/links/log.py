"""Link samples as JSON lines: what estimates were made of, to be replayed."""

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
    """For who keeps none."""


@contextmanager
def link_log(path: Path) -> Iterator[Callable[[LinkSample], None]]:
    """Append samples to a file while the context lasts. When the disk is full, warn once and go on without.

    Raises:
        StorageError: it can't be opened.
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
            log.warning("can't write %s any more: %s; going on without", path, error.strerror)

    with file:
        yield write


class LinkLogReader:
    """A log that may still be written: each reading gives what is new."""

    def __init__(self, path: Path) -> None:
        """Nothing is read yet."""
        self._path = path
        self._offset = self._lines = 0
        self._decoder = msgspec.json.Decoder(LinkSample)

    def read(self) -> Iterator[LinkSample]:
        """Samples since the last reading; a last line that is not complete is left for the next one.

        Raises:
            StorageError: it can't be read, or a line is no sample.
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
                raise StorageError(f"{self._path}, line {self._lines} is no link sample: {error}") from None


def read_link_log(path: Path) -> Iterator[LinkSample]:
    """The samples of a log; a last line that a crash cut off is left out.

    Raises:
        StorageError: see `LinkLogReader.read`.
    """
    return LinkLogReader(path).read()
