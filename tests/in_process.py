"""Commands run in the process of the tests: the parser, the errors and the exit codes are those of a real process."""

import io
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

from common.console import LOG_FORMAT, exit_code

_COMMANDS = {
    "bs_coordinator": ("bs_coordinator.commands.main", "wdmoe-bs", "bs"),
    "edge_node": ("edge_node.cli", "wdmoe-node", "edge"),
    "exporter": ("exporter.cli", "wdmoe-export", "exporter"),
    "testbed": ("testbed.cli", "wdmoe-testbed", "testbed"),
}


def run_in_process(
    package: str, *arguments: object, input: str | bytes = b"", env: Mapping[str, str] | None = None
) -> CompletedProcess[str]:
    """Run a command here, which saves the seconds that a process takes to import its libraries.

    A test that needs signals, a process's end, or output after an interpreter's exit starts a process instead
    (the fixture `run_process`).

    Args:
        package: package of the command, as in `python -m package`.
        input: stdin.
        env: variables to add to the environment.
    """
    module, prog_name, extra = _COMMANDS[package]
    argv = [os.fspath(a) if isinstance(a, Path) else str(a) for a in arguments]
    # Errors as Python's own streams handle them.
    out, err = (
        io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=errors, write_through=True)
        for errors in ("strict", "backslashreplace")
    )
    stdin = io.TextIOWrapper(io.BytesIO(input.encode() if isinstance(input, str) else input), encoding="utf-8")
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        mock.patch.object(sys, "stdin", stdin),
        mock.patch.dict(os.environ, env or {}),
        _logging_to(err),
        _signal_handlers_kept(),
    ):
        code = exit_code(import_module(module).cli, prog_name, argv, extra=extra)
    return CompletedProcess([prog_name, *argv], code, _text(out), _text(err))


def _text(stream: io.TextIOWrapper) -> str:
    return stream.buffer.getvalue().decode()  # type: ignore[attr-defined,no-any-return]


@contextmanager
def _logging_to(stream: io.TextIOWrapper) -> Iterator[None]:
    """As `common.console.run` sets it up, which pytest's own handlers would keep it from doing."""
    root, handler = logging.getLogger(), logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(handler)


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
