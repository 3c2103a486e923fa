"""Runs a command of this project so that every failure ends with one line and an exit code, without a traceback.

Commands are click commands; all of them know `-h` besides `--help`. `WDMOE_DEBUG=1` in the environment keeps the
traceback for developers.
"""

import errno
import io
import logging
import os
import sys
import unicodedata
from collections.abc import Sequence

import click

from common.errors import MissingPackageError, StorageError, WdmoeError
from common.extras import describe_missing, missing_package
from common.interruption import end_on_signals

DEFECT = 70
"""Exit code of an unexpected error (sysexits.h: EX_SOFTWARE)."""
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class LogFormatter(logging.Formatter):
    """Messages of one line each, without control characters: nodes and callers have a say in what is logged."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The line of a record, before its traceback."""
        return printable(" ".join(super().formatMessage(record).splitlines()))


def run(command: click.Command, prog_name: str, *, extra: str) -> None:
    """Run `command` on `sys.argv` and end the process with its exit code; `extra` as for `exit_code`.

    SIGTERM ends a command as Ctrl-C does, unless it handles the signal.
    """
    end_on_signals()
    level = logging.DEBUG if _debug() else logging.INFO
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter(LOG_FORMAT))
    logging.basicConfig(level=level, handlers=[handler])
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A model can say what this terminal's encoding can't write, and paths need not be text at all.
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(exit_code(command, prog_name, extra=extra))


def exit_code(
    command: click.Command, prog_name: str, arguments: Sequence[str] | None = None, *, extra: str = ""
) -> int:
    """Run `command`; an error is printed as one line on stderr.

    Args:
        arguments: `sys.argv[1:]` if None.
        extra: the optional dependencies of this project that the command needs, such as `bs` of `wdmoe[bs]`.

    Returns:
        The exit code: 0, the error's own, 2 for wrong usage, 130 when interrupted, 141 when the reader of our output is
        gone, `DEFECT` for an error that no code here foresaw.

    Raises:
        Exception: any error, with `WDMOE_DEBUG=1` in the environment.
    """
    debug = _debug()
    try:
        result = command.main(arguments, prog_name=prog_name, standalone_mode=False, help_option_names=["-h", "--help"])
    except WdmoeError as error:
        if debug:
            raise
        return _fail(prog_name, str(error), error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()  # the help of a group without a subcommand, on stderr
        return error.exit_code
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else prog_name
        return _fail(where, f"{error.format_message()} (try '{where} --help')", error.exit_code)
    except click.ClickException as error:
        return _fail(prog_name, error.format_message(), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _fail(prog_name, "interrupted", 130)
    except BrokenPipeError:
        # The reader of our output, such as head or a closed terminal, has gone: not worth a message.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if debug:
            raise
        return _fail(prog_name, describe_os_error(error), StorageError.exit_code)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
            # Bytes of a path or an argument that are not UTF-8 can't become part of a JSON document.
            return _fail(prog_name, f"{error.object[:200]!r} is not UTF-8: rename it", StorageError.exit_code)
        if package := missing_package(error):
            return _fail(prog_name, describe_missing(package, extra), MissingPackageError.exit_code)
        what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return _fail(prog_name, f"a defect of ours, {what} (WDMOE_DEBUG=1 shows where)", DEFECT)
    return result if isinstance(result, int) else 0


def _debug() -> bool:
    return os.environ.get("WDMOE_DEBUG", "") not in ("", "0")


def _fail(prefix: str, message: str, code: int) -> int:
    one_line = printable(" ".join(message.split()))
    click.echo(f"{prefix}: error: {one_line}", err=True)
    return code


def printable(text: str) -> str:
    """The text with control characters escaped, but for line breaks and tabs: others may command the terminal.

    Letters of any language stay as they are, as do the halves of characters that stand for bytes that are not UTF-8.
    """
    if text.isprintable():
        return text
    return "".join(
        f"\\x{ord(sign):02x}" if unicodedata.category(sign) == "Cc" and sign not in "\n\t" else sign for sign in text
    )


def describe_os_error(error: OSError) -> str:
    """One line for an operating-system error, naming the file and, for a full disk, what to do."""
    where = f" ({error.filename})" if error.filename else ""
    hint = ": free some space or choose another folder" if error.errno in _DISK_FULL else ""
    return f"{error.strerror or error}{where}{hint}"
