"""How each command of this project ends: one clear line and an exit code, never a traceback.

Commands are click commands. `WDMOE_DEBUG=1` in the environment keeps the traceback for developers.
"""

import errno
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import click

from common.errors import StorageError, WdmoeError

DEFECT = 70
"""Exit code of what nobody foresaw (sysexits.h: EX_SOFTWARE)."""
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run(command: click.Command, prog_name: str) -> None:
    """Run `command` on `sys.argv` and leave the process with the exit code of what happened."""
    debug = os.environ.get("WDMOE_DEBUG", "") not in ("", "0")
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    sys.exit(_exit_code(lambda: command.main(prog_name=prog_name, standalone_mode=False), prog_name, debug))


def _exit_code(call: Callable[[], Any], prog_name: str, debug: bool) -> int:
    try:
        result = call()
    except WdmoeError as error:
        if debug:
            raise
        return _fail(prog_name, str(error), error.exit_code)
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else prog_name
        return _fail(where, f"{error.format_message()} (try '{where} --help')", error.exit_code)
    except click.ClickException as error:
        return _fail(prog_name, error.format_message(), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _fail(prog_name, "interrupted", 130)
    except BrokenPipeError:
        # The reader of our output (head, a closed terminal) left: not worth a message.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if debug:
            raise
        return _fail(prog_name, describe_os_error(error), StorageError.exit_code)
    except Exception as error:
        if debug:
            raise
        what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return _fail(prog_name, f"a defect of ours, {what} (WDMOE_DEBUG=1 shows where)", DEFECT)
    return result if isinstance(result, int) else 0


def _fail(who: str, message: str, code: int) -> int:
    one_line = " ".join(message.split())
    click.echo(f"{who}: error: {one_line}", err=True)
    return code


def describe_os_error(error: OSError) -> str:
    """One line for an operating-system error, naming the file and, for a full disk, what to do."""
    where = f" ({error.filename})" if error.filename else ""
    hint = ": free some space or choose another folder" if error.errno in _DISK_FULL else ""
    return f"{error.strerror or error}{where}{hint}"
