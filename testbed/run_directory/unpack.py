"""Opening archives of runs without trusting them: only plain files below one folder, within limits, are written."""

import hashlib
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, cast

import pyarrow as pa

from common.console import describe_os_error
from common.errors import StorageError
from testbed.errors import ArchiveError
from testbed.run_directory.archive_file import CHECKSUMS, ENDINGS, archive_name, open_compressed
from testbed.run_directory.directory import MANIFEST, RunDir

MAX_BYTES = 16 << 30
"""Total size of the unpacked files; a night with eight nodes takes far less than one GiB."""
MAX_FILES = 200_000
_BUFFER_BYTES = 1 << 20
_HEADER_BYTES = 64 << 10
"""Most bytes between two files: headers, padding and read-ahead. Our headers take 512 bytes, those of GNU tar with long
names and extended attributes a few KiB."""
_MOST_PATH = 400


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
    """Unpack and check an archive; the folder appears complete or not at all.

    Args:
        folder: where the run's files go; must not exist.

    Returns:
        `folder`.

    Raises:
        ArchiveError: the archive is damaged, differs from its checksums, contains anything but plain files below one
            folder, or exceeds `max_bytes` or `max_files`.
        StorageError: the folder can't be written.
    """
    archive_name(archive)
    if folder.exists():
        raise ArchiveError(f"{folder} exists already: choose another --out, or use that folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            part = Path(temporary) / "run"
            part.mkdir()
            found = _extract(archive, part, max_bytes, max_files)
            _check(archive, part, found)
            part.rename(folder)
    except ArchiveError:
        raise
    except (tarfile.TarError, EOFError, pa.ArrowException) as error:
        raise ArchiveError(f"{archive} is damaged: {_one_line(error)}") from None
    except OSError as error:
        # Arrow reports bad zstd data as an OSError without an errno.
        if error.errno is None:
            raise ArchiveError(f"{archive} is damaged: {_one_line(error)}") from None
        raise StorageError(f"can't unpack {archive}: {describe_os_error(error)}") from error
    return folder


class _Rationed:
    """A stream that limits how much can be read before the next file begins.

    tarfile reads extended headers whole, however long they claim to be, and doesn't show their size before.
    """

    def __init__(self, archive: Path, stream: IO[bytes]) -> None:
        self._archive, self._stream = archive, stream
        self.left = _HEADER_BYTES
        """Bytes that may still be read before the next file."""

    def read(self, size: int) -> bytes:
        """Read at most `size` bytes; fewer at the end of the stream.

        Raises:
            ArchiveError: the limit is exceeded.
        """
        block = self._stream.read(min(size, self.left + 1))
        self.left -= len(block)
        if self.left < 0:
            raise ArchiveError(
                f"{self._archive} has a header of more than {_HEADER_BYTES >> 10} KiB: not a run's archive"
            )
        return block


def _extract(archive: Path, folder: Path, max_bytes: int, max_files: int) -> dict[str, str]:
    """Unpack all files into `folder`; returns the SHA-256 of each by its path."""
    found: dict[str, str] = {}
    left, members = max_bytes, 0
    with (
        open_compressed(archive, "rb") as compressed,
        tarfile.open(fileobj=cast(IO[bytes], stream := _Rationed(archive, compressed)), mode="r|") as tar,
    ):
        while (member := tar.next()) is not None:
            # tarfile keeps all members with their headers: drop them, memory would grow with the archive.
            tar.members, tar.pax_headers = [], {}  # type: ignore[attr-defined]
            stream.left = _HEADER_BYTES
            members += 1
            if members > max_files or not 0 <= member.size <= left:
                raise ArchiveError(
                    f"{archive} contains more than {max_bytes >> 20} MiB or {max_files} files: not a run's archive"
                )
            if member.isdir():
                continue
            path = _inside(archive, member)
            if path in found:
                raise ArchiveError(f"{archive} contains {path} twice")
            stream.left += member.size
            left -= member.size
            source = tar.extractfile(member)
            assert source is not None  # noqa: S101 (it is a plain file)
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256()
            with target.open("xb") as file:
                while block := source.read(_BUFFER_BYTES):
                    digest.update(block)
                    file.write(block)
            found[path] = digest.hexdigest()
    return found


def _inside(archive: Path, member: tarfile.TarInfo) -> str:
    """Path of a member below the archive's one folder."""
    pure = PurePosixPath(member.name)
    parts = pure.parts
    odd = pure.is_absolute() or ".." in parts or len(parts) < 2 or "\\" in member.name or "\0" in member.name
    # A sparse file's size says more than the archive contains.
    if not member.isreg() or member.issparse() or odd or len(member.name) > _MOST_PATH:
        raise ArchiveError(f"{archive} contains {member.name[:80]!r}, which is not a plain file below one folder")
    return PurePosixPath(*parts[1:]).as_posix()


def _check(archive: Path, folder: Path, found: dict[str, str]) -> None:
    """Check that the files are exactly those that the checksums list."""
    if MANIFEST not in found or CHECKSUMS not in found:
        raise ArchiveError(f"{archive} is not a run's archive: {MANIFEST} or {CHECKSUMS} is missing")
    lines = (folder / CHECKSUMS).read_text(errors="replace").splitlines()
    wanted = {path: sha256 for sha256, _, path in (line.partition("  ") for line in lines)}
    del found[CHECKSUMS]
    if odd := sorted(path for path in wanted.keys() | found.keys() if wanted.get(path) != found.get(path)):
        raise ArchiveError(
            f"{archive} has changed since it was made: {odd[0][:80]!r}"
            f"{f' and {len(odd) - 1} more' if len(odd) > 1 else ''} differ from {CHECKSUMS}"
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
