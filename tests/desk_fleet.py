"""`wdmoe-testbed up` as a process."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from bs_coordinator.broker.processes import stop_child
from tests.waiting import wait_until


class DeskFleet(NamedTuple):
    """A running fleet.

    Attributes:
        process: of the command.
        argv: that it was started with.
        out, log: files with its stdout and stderr.
    """

    process: "subprocess.Popen[bytes]"
    argv: list[str]
    out: Path
    log: Path


@contextmanager
def desk_fleet(bundle: Path, port: int, folder: Path) -> Iterator[DeskFleet]:
    """Two nodes and a server at `port`, ready to answer; ended at the end.

    Args:
        folder: for the fleet's files.
    """
    argv = [
        *(sys.executable, "-m", "testbed", "up", "--bundle", str(bundle), "--nodes", "2"),
        *("--port", str(port), "--runs", str(folder)),
    ]
    out, log = folder / "out", folder / "log"
    with out.open("wb") as stdout, log.open("wb") as stderr:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)
    try:

        def ready() -> bool:
            assert process.poll() is None, log.read_text()
            return "Ctrl-C" in out.read_text()

        wait_until(ready, "the fleet")
        yield DeskFleet(process, argv, out, log)
    finally:
        stop_child(process)
