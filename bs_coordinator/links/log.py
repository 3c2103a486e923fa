"""Link samples as JSON lines: what estimates were made of, to be replayed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from bs_coordinator.links.estimator import LinkSample
from wire.errors import StorageError

_NEWLINE = b"\n"


def no_log(sample: LinkSample) -> None:
    """For who keeps none."""


@contextmanager
def link_log(path: Path) -> Iterator[Callable[[LinkSample], None]]:
    """Append samples to a file while the context lasts.

    Raises:
        StorageError: it can't be opened.
    """
    try:
        file = path.open("ab")
    except OSError as error:
        raise StorageError(f"can't write {path}: {error.strerror}") from error
    encoder = msgspec.json.Encoder()

    def write(sample: LinkSample) -> None:
        file.write(encoder.encode(sample) + _NEWLINE)

    with file:
        yield write


def read_link_log(path: Path) -> Iterator[LinkSample]:
    """The samples of a log; a last line that a crash cut off is left out.

    Raises:
        StorageError: it can't be read, or a line is no sample.
    """
    try:
        lines = path.read_bytes().split(_NEWLINE)
    except OSError as error:
        raise StorageError(f"can't read {path}: {error.strerror}") from error
    decoder = msgspec.json.Decoder(LinkSample)
    for number, line in enumerate(lines[:-1], 1):
        try:
            yield decoder.decode(line)
        except msgspec.DecodeError as error:
            raise StorageError(f"{path}, line {number} is no link sample: {error}") from None
