"""Scripts that open a cluster when they are imported, as by every process that `multiprocessing` starts."""

import multiprocessing
import sys

from common.config import ConfigError

_UNGUARDED = 86
"""Exit code of a process that was to open a cluster while it was still importing the script."""
_IMPORT_S = 300.0


def end_if_importing() -> None:
    """End this process if `multiprocessing` has started it and it is still importing the program's script."""
    # The standard library's own check reads this attribute too, and has no public name for it.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(_UNGUARDED)


def check_main_guard() -> None:
    """Check in a new process that the program's script can be imported without opening a cluster.

    Raises:
        ConfigError: it opens one.
    """
    process = multiprocessing.get_context("spawn").Process(target=_nothing, daemon=True)
    process.start()
    process.join(_IMPORT_S)
    unguarded = process.exitcode == _UNGUARDED
    process.kill()
    process.join()
    process.close()
    if unguarded:
        raise ConfigError(
            "Cluster.local starts processes that import this script again: write 'if __name__ == \"__main__\":' above "
            "the lines that open the cluster, and indent them"
        ) from None


def _nothing() -> None:
    """What the new process does after it has imported the script."""
