"""The base of all errors, and those that every folder can raise.

`docs/exit-codes.md` lists all errors and their exit codes.
"""


def one_line(error: Exception) -> str:
    """The message of any error without line breaks; the name of its class if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


class WdmoeError(Exception):
    """Base of all errors of this project: `str(error)` is the one line that the user reads."""

    exit_code = 1


class StorageError(WdmoeError):
    """A file could not be written."""

    exit_code = 12


class KeyFileError(WdmoeError):
    """A key file is missing, not a key, or readable by other users."""

    exit_code = 51


class MissingPackageError(WdmoeError):
    """A Python package of an extra, such as `wdmoe[bs]`, is not installed."""

    exit_code = 52
