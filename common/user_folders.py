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
        raise StorageError(f"the user's {kind} folder {str(path)!r} is no absolute path: set HOME or {_variable(kind)}")
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
        message = describe_os_error(error) if isinstance(error, OSError) else str(error)
        related = any(str(folder) in message for folder in (path, path.parent))
        if not related:
            raise
        raise StorageError(f"{message}: {_variable(kind)} can name another folder") from error


def _variable(kind: Kind) -> str:
    return f"XDG_{kind.upper()}_HOME"
