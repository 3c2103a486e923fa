"""The user's own folders for caches, settings and state, which may be missing, odd or read-only."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from common.console import describe_os_error
from common.errors import StorageError

Kind = Literal["cache", "config", "state"]


def user_path(kind: Kind) -> Path:
    """This project's folder of a kind; it need not exist.

    Raises:
        StorageError: the environment names no absolute path.
    """
    import platformdirs

    paths = {"cache": platformdirs.user_cache_path, "config": platformdirs.user_config_path}
    path = paths.get(kind, platformdirs.user_state_path)("wdmoe")
    if not path.is_absolute():
        raise StorageError(
            f"the user's {kind} folder {str(path)!r} is not an absolute path: set HOME or XDG_{kind.upper()}_HOME"
        )
    return path


@contextmanager
def user_folder(kind: Kind) -> Iterator[Path]:
    """This project's folder of a kind; an error in it names the variable with which another one can be chosen.

    Raises:
        StorageError: the folder can't be made, read or written.
    """
    path = user_path(kind)
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield path
    except (OSError, StorageError) as error:
        if (message := describe(error, kind)) is None:
            raise
        raise StorageError(message) from error


def describe(error: OSError | StorageError, kind: Kind) -> str | None:
    """An error in one line, with the variable that can name another folder; None if the folder is not the reason.

    Folders above it are a reason, too: a home that does not exist is named where it would have to be made.
    """
    path = user_path(kind)
    cause = error.__cause__ if isinstance(error, StorageError) else error
    named = cause.filename if isinstance(cause, OSError) else None
    message = describe_os_error(error) if isinstance(error, OSError) else str(error)
    related = any(str(folder) in message for folder in (path, path.parent))
    if not related and not (isinstance(named, str) and Path(named) in path.parents):
        return None
    return f"{message}: XDG_{kind.upper()}_HOME can name another folder"
