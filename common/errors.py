"""The base of all errors, and those that every room can raise.

`docs/exit-codes.md` lists the exit codes of all rooms.
"""


def one_line(error: Exception) -> str:
    """What an error of any library says, without line breaks; its class where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


class WdmoeError(Exception):
    """Base of all errors of this project: `str(error)` is the one line that the user reads."""

    exit_code = 1


class StorageError(WdmoeError):
    """A file could not be written."""

    exit_code = 12


class KeyFileError(WdmoeError):
    """A key file is missing, not one, or can be read by others."""

    exit_code = 51
