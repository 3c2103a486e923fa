"""Samples that take long to measure. Each becomes a line of a file at once, and an interrupted benchmark continues."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

import msgspec
from msgspec import Struct

from common.files import append_all
from common.jsonl import drop_cut_line, read_json_lines
from testbed import facts

S = TypeVar("S", bound=Struct)


class SampleLog(Generic[S]):
    """The samples so far.

    Attributes:
        samples: those that an interrupted benchmark left, and all that were added.
    """

    def __init__(self, file: BinaryIO, samples: list[S]) -> None:
        self._file = file
        self.samples = samples

    def add(self, sample: S) -> None:
        """Keep a sample, also beyond a crash."""
        append_all(self._file.fileno(), msgspec.json.encode(sample) + b"\n")
        self.samples.append(sample)


@contextmanager
def sample_log(folder: Path, name: str, kind: type[S]) -> Iterator[SampleLog[S]]:
    """The log of a benchmark, begun or continued.

    Only an interrupted benchmark of the same commit is continued: a table must not mix versions of the code. After
    the context has ended without an error, the log is `<name>.jsonl`, and the next benchmark begins anew.
    """
    folder.mkdir(parents=True, exist_ok=True)
    commit, dirty = facts.commit()
    path = folder / f"{name}-{commit[:12]}.jsonl"
    if dirty:
        path.unlink(missing_ok=True)
    path.touch()
    drop_cut_line(path)
    samples = list(read_json_lines(path, msgspec.json.Decoder(kind).decode))
    with path.open("ab", buffering=0) as file:
        yield SampleLog(file, samples)
    path.replace(folder / f"{name}.jsonl")
