"""Runs the programs of an arm: start, wait until they are ready, memory, last words, end."""

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from msgspec import Struct

from bs_coordinator.broker.processes import die_with_parent, stop_child
from common.errors import WdmoeError
from testbed.local_nodes import blas_threads
from testbed.process_memory import memory_bytes
from testbed.versus.arms import Arm, Program
from testbed.versus.client import is_ready

_POLL_S = 0.1
_LISTENING = "0A"
"""State of a socket in /proc/net/tcp."""
_TAIL_BYTES = 8192


class Memory(Struct, frozen=True):
    """Memory of an arm's processes on one device.

    Attributes:
        peak_rss_bytes: sum of their largest resident sets so far.
        pss_bytes: proportional share of resident memory now: pages that several processes map count once in all.
    """

    device: str
    peak_rss_bytes: int
    pss_bytes: int


class RunningArm:
    """An arm whose programs run.

    Attributes:
        arm: what was started.
    """

    def __init__(self, arm: Arm, prefix: Callable[[str], Sequence[str]], folder: Path, threads: int) -> None:
        """Nothing is started yet.

        Args:
            prefix: words to put before a command, by device.
            folder: for the programs' logs.
            threads: of each program.
        """
        self.arm = arm
        self._prefix = prefix
        self._folder = folder
        self._threads = threads
        self._processes: list[tuple[Program, subprocess.Popen[bytes]]] = []
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, deadline_s: float) -> None:
        """Start the workers, then the head, and wait until it is ready.

        Raises:
            WdmoeError: a program can't be started, has ended, or is not ready after `deadline_s`.
        """
        until_s = time.monotonic() + deadline_s
        for worker in self.arm.workers:
            self._start(worker)
        for worker, process in list(self._processes):
            if worker.port is not None:
                self._wait(worker, partial(_listens, process.pid, worker.port), until_s, deadline_s)
        self._start(self.arm.head)
        self._wait(self.arm.head, partial(is_ready, self.arm.port, self.arm.ready_path), until_s, deadline_s)

    def kill(self, device: str) -> None:
        """End this arm's programs on a device at once, as if it had lost its power; its kernel still says so."""
        for program, process in self._processes:
            if program.device == device:
                process.kill()
                process.wait()

    def last_words(self, *, wait_s: float = 0.0) -> str:
        """Last line that the head wrote, and how it ended if it did.

        Args:
            wait_s: how long to wait for its end: a head that aborts closes its connections before it has ended.
        """
        head, process = self._processes[-1]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)
        return self._describe(head, process)

    def memory(self) -> list[Memory]:
        """Memory by device, the base station first."""
        found: dict[str, Memory] = {}
        for program, process in reversed(self._processes):
            peak, pss = memory_bytes(process.pid)
            before = found.get(program.device, Memory(program.device, 0, 0))
            found[program.device] = Memory(program.device, before.peak_rss_bytes + peak, before.pss_bytes + pss)
        return list(found.values())

    def stop(self) -> None:
        """End all programs at once, and wait until they have ended; another thread that starts them then fails."""
        processes = [process for _, process in reversed(self._processes)]  # the head first
        for process in processes:
            process.terminate()
        for process in processes:
            stop_child(process)

    def _start(self, program: Program) -> None:
        with self._log(program).open("wb") as log:
            try:
                process = subprocess.Popen(
                    [*self._prefix(program.device), *die_with_parent(list(program.argv))],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                    env={**os.environ, **blas_threads(self._threads), **program.environment},
                )  # fmt: skip
            except OSError as error:
                raise WdmoeError(f"{program.argv[0]} can't be started: {error.strerror}") from None
        self._processes.append((program, process))

    def _wait(self, program: Program, ready: Callable[[], bool], until_s: float, deadline_s: float) -> None:
        while not ready():
            for other, process in list(self._processes):
                if process.poll() is not None:
                    raise WdmoeError(f"{other.device}: {self._describe(other, process)}")
            if time.monotonic() > until_s:
                raise WdmoeError(
                    f"{program.device}: not ready after {deadline_s:g} s; last line: {last_line(self._log(program))}"
                )
            time.sleep(_POLL_S)

    def _describe(self, program: Program, process: subprocess.Popen[bytes]) -> str:
        code = process.poll()
        ended = "" if code is None else f"ended with exit code {code}; "
        return f"{ended}last line: {last_line(self._log(program))}"

    def _log(self, program: Program) -> Path:
        return self._folder / f"{program.device}.log"


def last_line(log: Path) -> str:
    """Last line of a log that is not empty."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode("utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "no output"


def _listens(pid: int, port: int) -> bool:
    """Whether a process's network namespace has a socket that listens on a TCP port, without connecting to it."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == _LISTENING and int(local.rpartition(":")[2], 16) == port:
                return True
    return False
