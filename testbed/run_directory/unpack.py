"""Opening archives of runs without trusting them: only plain files below one folder, within limits, are written."""

import hashlib
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, cast

import pyarrow as pa

from common.console import describe_os_error
from common.errors import StorageError
from testbed.errors import ArchiveError
from testbed.run_directory.archive_file import CHECKSUMS, ENDINGS, archive_name, open_compressed
from testbed.run_directory.directory import MANIFEST, RunDir

MAX_BYTES = 4 << 30
"""Total size of the unpacked files; a night with eight nodes takes far less than one GiB."""
MAX_RATIO = 200
"""Unpacked bytes per byte of the archive: tables and pages of runs shrink to a tenth, text of zeros to a thousandth."""
SMALL_BYTES = 64 << 20
"""Below this size the ratio does not matter."""
MAX_FILES = 200_000
_BUFFER_BYTES = 1 << 20
_HEADER_BYTES = 64 << 10
"""Most bytes between two files: headers, padding and read-ahead. Our headers take 512 bytes, those of GNU tar with long
names and extended attributes a few KiB."""
_HEADERS_BYTES = 256 << 20
"""Most bytes of all headers together."""
_MOST_PATH = 400
_MOST_NAME_BYTES = 255
"""Longest name of a file on Linux."""


def is_archive(path: Path) -> bool:
    """Whether a path names an archive rather than a run's folder."""
    return path.is_file() or (path.name.endswith(ENDINGS) and not path.is_dir())


@contextmanager
def opened(path: Path) -> Iterator[RunDir]:
    """Open a run from its folder or its archive; an archive is unpacked for the duration of the context.

    Raises:
        RunDirectoryError: the folder is not a run's.
        ArchiveError: the archive is damaged or not a run's.
    """
    if not is_archive(path):
        yield RunDir(path)
        return
    with tempfile.TemporaryDirectory(prefix="wdmoe-archive-") as folder:
        yield RunDir(unpack(path, Path(folder) / archive_name(path)))


def unpack(archive: Path, folder: Path, *, max_bytes: int = MAX_BYTES, max_files: int = MAX_FILES) -> Path:
    """Check an archive and unpack it; nothing is written before all of it has been read and found right.

    Args:
        folder: where the run's files go; must not exist. It appears complete or not at all.

    Returns:
        `folder`.

    Raises:
        ArchiveError: the archive is damaged, differs from its checksums, contains anything but plain files below one
            folder, or exceeds `max_bytes`, `MAX_RATIO` or `max_files`.
        StorageError: the folder can't be written, or the disk has too little space.
    """
    archive_name(archive)
    if folder.exists():
        raise ArchiveError(f"{folder} exists already: choose another --out, or use that folder")
    checked = check_archive(archive, max_bytes=max_bytes, max_files=max_files)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if checked.bytes > free:
            raise StorageError(
                f"{archive} needs {checked.bytes >> 20} MiB, {folder.parent} has {free >> 20} MiB free: "
                "free some space or unpack it on another disk"
            )
        with tempfile.TemporaryDirectory(prefix=f".{folder.name[:64]}-", dir=folder.parent) as temporary:
            part = Path(temporary) / "run"
            part.mkdir()
            with _readable(archive), _files(archive, max_bytes, max_files) as files:
                for path, size, blocks in files:
                    if checked.sha256.get(path) != _write(part / path, blocks):
                        raise ArchiveError(f"{archive} changed while it was unpacked: {path[:80]!r} of {size} bytes")
            part.rename(folder)
    except OSError as error:
        raise StorageError(f"can't unpack {archive}: {describe_os_error(error)}") from error
    return folder


class CheckedArchive(NamedTuple):
    """What an archive contains.

    Attributes:
        bytes: total size of the unpacked files.
        sha256: SHA-256 of each file by its path.
    """

    bytes: int
    sha256: dict[str, str]


def check_archive(archive: Path, *, max_bytes: int = MAX_BYTES, max_files: int = MAX_FILES) -> CheckedArchive:
    """Read an archive to its end without writing anything.

    Raises:
        ArchiveError: as `unpack`.
        StorageError: the archive can't be read.
    """
    total, sha256, checksums = 0, {}, b""
    with _readable(archive), _files(archive, max_bytes, max_files) as files:
        for path, size, blocks in files:
            digest = hashlib.sha256()
            for block in blocks:
                digest.update(block)
                if path == CHECKSUMS:
                    checksums += block
            sha256[path] = digest.hexdigest()
            total += size
    if MANIFEST not in sha256 or CHECKSUMS not in sha256:
        raise ArchiveError(f"{archive} is not a run's archive: {MANIFEST} or {CHECKSUMS} is missing")
    if both := sorted(sha256.keys() & {str(folder) for path in sha256 for folder in PurePosixPath(path).parents}):
        raise ArchiveError(f"{archive} contains {both[0][:80]!r} as a file and as a folder")
    lines = checksums.decode(errors="replace").splitlines()
    wanted = {path: digest for digest, _, path in (line.partition("  ") for line in lines)}
    wanted[CHECKSUMS] = sha256[CHECKSUMS]
    if odd := sorted(path for path in wanted.keys() | sha256.keys() if wanted.get(path) != sha256.get(path)):
        raise ArchiveError(
            f"{archive} has changed since it was made: {odd[0][:80]!r}"
            f"{f' and {len(odd) - 1} more' if len(odd) > 1 else ''} differ from {CHECKSUMS}"
        )
    return CheckedArchive(total, sha256)


@contextmanager
def _readable(archive: Path) -> Iterator[None]:
    """Turn errors of the libraries that read the archive into ours."""
    try:
        yield
    except (tarfile.TarError, EOFError, ValueError, zlib.error, pa.ArrowException) as error:
        raise ArchiveError(f"{archive} is damaged: {_one_line(error)}") from None
    except OSError as error:
        # Arrow reports bad zstd data as an OSError without an errno, gzip bad data as one of its own.
        if error.errno is None:
            raise ArchiveError(f"{archive} is damaged: {_one_line(error)}") from None
        raise StorageError(f"can't unpack {archive}: {describe_os_error(error)}") from error


class _Rationed:
    """A stream that limits how much can be read before the next file begins.

    tarfile reads extended headers whole, however long they claim to be, and doesn't show their size before.
    """

    def __init__(self, archive: Path, stream: IO[bytes], limit: int) -> None:
        self._archive, self._stream = archive, stream
        self._all_left = limit + _HEADERS_BYTES
        self.left = _HEADER_BYTES
        """Bytes that may still be read before the next file."""

    def read(self, size: int) -> bytes:
        """Read at most `size` bytes; fewer at the end of the stream.

        Raises:
            ArchiveError: the limit is exceeded.
        """
        block = self._stream.read(min(size, self.left + 1))
        self.left -= len(block)
        self._all_left -= len(block)
        if self._all_left < 0:
            raise ArchiveError(
                f"{self._archive} has more than {_HEADERS_BYTES >> 20} MiB of headers: not a run's archive"
            )
        if self.left < 0:
            raise ArchiveError(
                f"{self._archive} has a header of more than {_HEADER_BYTES >> 10} KiB: not a run's archive"
            )
        return block


@contextmanager
def _files(archive: Path, max_bytes: int, max_files: int) -> Iterator[Iterator[tuple[str, int, Iterator[bytes]]]]:
    """The files of an archive, each with its path below the archive's one folder, its size, and its blocks."""
    if not archive.is_file():
        raise ArchiveError(f"{archive} is {'not a plain file' if archive.exists() else 'missing'}")
    limit = min(max_bytes, max(SMALL_BYTES, MAX_RATIO * archive.stat().st_size))
    with (
        open_compressed(archive, "rb") as compressed,
        tarfile.open(fileobj=cast(IO[bytes], stream := _Rationed(archive, compressed, limit)), mode="r|") as tar,
    ):
        yield _members(archive, stream, tar, limit, max_files)


def _members(
    archive: Path, stream: _Rationed, tar: tarfile.TarFile, limit: int, max_files: int
) -> Iterator[tuple[str, int, Iterator[bytes]]]:
    found: set[str] = set()
    left, members = limit, 0
    while (member := tar.next()) is not None:
        # tarfile keeps all members with their headers: drop them, memory would grow with the archive.
        tar.members, tar.pax_headers = [], {}  # type: ignore[attr-defined]
        stream.left = _HEADER_BYTES
        members += 1
        if members > max_files or not 0 <= member.size <= left:
            raise ArchiveError(
                f"{archive} unpacks to more than {limit >> 20} MiB or {max_files} files: not a run's archive"
            )
        if member.isdir():
            continue
        path = _inside(archive, member)
        if path in found:
            raise ArchiveError(f"{archive} contains {path} twice")
        found.add(path)
        stream.left += member.size
        left -= member.size
        source = tar.extractfile(member)
        assert source is not None  # noqa: S101 (it is a plain file)
        yield path, member.size, iter(partial(source.read, _BUFFER_BYTES), b"")


def _write(target: Path, blocks: Iterator[bytes]) -> str:
    """Write a file; returns its SHA-256."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with target.open("xb") as file:
        for block in blocks:
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def _inside(archive: Path, member: tarfile.TarInfo) -> str:
    """Path of a member below the archive's one folder."""
    pure = PurePosixPath(member.name)
    parts = pure.parts
    odd = pure.is_absolute() or ".." in parts or len(parts) < 2 or "\\" in member.name or "\0" in member.name
    # A sparse file's size says more than the archive contains.
    odd = odd or len(member.name) > _MOST_PATH or any(len(os.fsencode(part)) > _MOST_NAME_BYTES for part in parts)
    if not member.isreg() or member.issparse() or odd:
        raise ArchiveError(f"{archive} contains {member.name[:80]!r}, which is not a plain file below one folder")
    return PurePosixPath(*parts[1:]).as_posix()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
