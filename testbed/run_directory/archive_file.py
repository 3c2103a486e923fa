"""The file format of a run's archive: a compressed tar file of one folder with checksums."""

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal, cast

import pyarrow as pa

from testbed.errors import ArchiveError

CHECKSUMS = "SHA256SUMS"
ENDINGS = (".tar.zst", ".tar.gz")


def archive_name(path: Path) -> str:
    """The name of an archive without its ending, which is also the name of the folder in it.

    Raises:
        ArchiveError: the name has another ending.
    """
    for ending in ENDINGS:
        if path.name.endswith(ending) and path.name != ending:
            return path.name.removesuffix(ending)
    raise ArchiveError(f"{path.name} is not the name of an archive: it must end in {' or '.join(ENDINGS)}")


@contextmanager
def open_compressed(path: Path, mode: Literal["rb", "wb"]) -> Iterator[IO[bytes]]:
    """The uncompressed tar stream of an archive, for reading or writing."""
    if path.name.endswith(".tar.gz"):
        with path.open(mode) as raw, gzip.GzipFile("", mode, 6, raw, mtime=0) as file:
            yield cast(IO[bytes], file)
    elif mode == "wb":
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            yield cast(IO[bytes], stream)
    else:
        with pa.CompressedInputStream(str(path), "zstd") as stream:
            yield cast(IO[bytes], stream)
