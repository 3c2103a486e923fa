"""A command that a test interrupts, and what must not be left of it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.waiting import PATIENCE_S


@contextmanager
def running_command(folder: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A command of `wdmoe-testbed` whose temporary files are in `folder`. It does not ignore SIGHUP if the tests do."""
    temporary = folder / "tmp"
    temporary.mkdir()
    ours = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    process = subprocess.Popen(
        [sys.executable, "-m", "testbed", *map(str, arguments)],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env={**os.environ, "TMPDIR": str(temporary)},
    )  # fmt: skip
    signal.signal(signal.SIGHUP, ours)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def children_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """All processes that a running command has started."""
    assert process.poll() is None, process.communicate()[1]
    return psutil.Process(process.pid).children(recursive=True)


def assert_clean_end(process: subprocess.Popen[str], children: list[psutil.Process], folder: Path) -> None:
    """The command ends as documented, and so do its processes; nothing half-written is left."""
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "wdmoe-testbed: error: interrupted"
    assert "Traceback" not in errors
    assert psutil.wait_procs(children, timeout=PATIENCE_S)[1] == []
    assert not list((folder / "tmp").glob("wdmoe-*"))
    assert not list(folder.rglob("*.tmp"))
