"""Writing files so that a reader never meets half of one, and keeping other processes out of a folder."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from common.console import describe_os_error
from common.errors import StorageError


@contextmanager
def atomic_write(path: Path, *, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; on success it takes that name, on failure it is removed.

    Args:
        mode: permissions of the file, less the umask.

    Raises:
        StorageError: the file could not be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            raise StorageError(f"can't write {path}: {describe_os_error(error)}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def append_all(fd: int, data: bytes) -> None:
    """Write all of `data` at the end of a file, or nothing of it.

    A single write to a disk that is nearly full may write a part and report no error. Half a line would spoil the one
    that a later process appends.

    Args:
        fd: open for writing, positioned at the end of the file.

    Raises:
        OSError: not all of it could be written; the file is as long as before.
    """
    before = os.fstat(fd).st_size
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[os.write(fd, rest) :]
    except OSError:
        with suppress(OSError):  # a pipe can't be cut
            os.ftruncate(fd, before)
            os.lseek(fd, before, os.SEEK_SET)
        raise


def sync(path: Path) -> None:
    """Return when a file's content, or a folder's list of names, is on disk and would survive a power cut.

    Raises:
        OSError: it can't be opened or written.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def folder_lock(folder: Path, *, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Keep other processes that take this lock out of a folder. A process that is killed releases it.

    The lock is on the folder itself: unlike a lock file, it leaves nothing behind in what will be published.

    Args:
        on_wait: called if another process holds the lock, before waiting for it; without it, that is an error.

    Raises:
        BlockingIOError: another process holds the lock, and `on_wait` is None.
        OSError: the folder can't be opened.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait is None:
                raise
            on_wait()
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError:
            # Some network file systems have no locks for folders: users must not run two processes there.
            pass
        yield
    finally:
        os.close(fd)
