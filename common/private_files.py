"""Reads files that only their owner may read."""

import stat
from pathlib import Path

from common.errors import KeyFileError


def check_private(path: Path) -> None:
    """Make sure that only the owner can read a file.

    Raises:
        KeyFileError: the file is missing, or other users may read it.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise KeyFileError(f"can't read {path}: {error.strerror}") from None
    if mode & 0o077:
        raise KeyFileError(f"{path} can be read by other users (mode {mode:o}): run 'chmod 600 {path}'")


def read_private(path: Path, *, most_bytes: int = 64 << 10) -> bytes:
    """The bytes of a small secret file.

    Raises:
        KeyFileError: the file can't be read, is too long, or other users may read it.
    """
    check_private(path)
    try:
        with path.open("rb") as file:
            secret = file.read(most_bytes + 1)
    except OSError as error:
        raise KeyFileError(f"can't read {path}: {error.strerror}") from None
    if len(secret) > most_bytes:
        raise KeyFileError(f"{path} is longer than {most_bytes} bytes: not a key")
    return secret
