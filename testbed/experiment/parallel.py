"""Runs cells that need no nodes in several processes at once, one cell in each.

Nothing is timed in these cells, so they may share the processor. A process of its own per cell costs some seconds of
start-up, and frees all memory and threads at its end, however it ends.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import IO

import torch

from common.cores import usable_cores
from testbed.local_nodes import blas_threads
from testbed.plan.cells import Cell
from testbed.run_directory.directory import RunDir

_POLL_S = 0.2
_START_S = 300.0
"""Time to load the model, besides the plan's limit for the cell."""
_END_S = 10.0


@dataclass(slots=True)
class _Child:
    """A process that measures a cell.

    Attributes:
        errors: its stderr.
        deadline_s: when it is killed, on the monotonic clock.
    """

    cell: Cell
    attempt: int
    process: subprocess.Popen[bytes]
    errors: IO[bytes]
    began_s: float
    deadline_s: float

    def end(self) -> None:
        """End the process, if it still runs."""
        self.process.terminate()
        try:
            self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()

    def error(self) -> str:
        """The last line that it wrote to stderr, or its exit code."""
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"its process ended with exit code {self.process.returncode}"


def run_parallel(
    run: RunDir, cells: Sequence[Cell], jobs: int, *, device: str | None, on_progress: Callable[[str], None]
) -> int:
    """Measure cells that need no nodes; returns the number of those that failed in all attempts.

    Args:
        jobs: number of processes.
        device: what computes the experts (`testbed.evaluation.local_experts.LocalExperts`). With `cuda`, the processes
            take turns among all GPUs.
    """
    todo = [(cell, 1) for cell in reversed(cells)]
    running: list[_Child] = []
    failed = 0
    threads = max(1, usable_cores() // jobs)
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    devices = cycle(gpus if device == "cuda" and gpus else [device])
    try:
        while todo or running:
            while todo and len(running) < jobs:
                cell, attempt = todo.pop()
                run.event("cell_started", cell=cell.id, attempt=attempt, what=str(cell))
                on_progress(f"{len(cells) - len(todo)}/{len(cells)} {cell}")
                running.append(_start(run, cell, attempt, threads, next(devices)))
            time.sleep(_POLL_S)
            for child in [c for c in running if c.process.poll() is not None or time.monotonic() > c.deadline_s]:
                running.remove(child)
                if _finished(run, child, on_progress):
                    continue
                if child.attempt < run.plan.attempts:
                    todo.append((child.cell, child.attempt + 1))
                else:
                    run.event("cell_given_up", cell=child.cell.id)
                    failed += 1
    finally:
        for child in running:
            child.end()
    return failed


def _start(run: RunDir, cell: Cell, attempt: int, threads: int, device: str | None) -> _Child:
    errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `_Child.end`)
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "testbed.experiment.one_cell",
            str(run.path),
            cell.id,
            str(attempt),
            *([device] if device else []),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        env={**os.environ, **blas_threads(threads)},
    )
    now = time.monotonic()
    return _Child(cell, attempt, process, errors, now, now + run.plan.cell_timeout_s + _START_S)


def _finished(run: RunDir, child: _Child, on_progress: Callable[[str], None]) -> bool:
    """Record how a process ended; returns whether its cell is complete."""
    late = child.process.poll() is None
    error = "the cell took longer than the plan's cell_timeout_s" if late else child.error()
    child.end()
    if run.is_complete(child.cell):
        seconds = time.monotonic() - child.began_s
        run.event("cell_finished", cell=child.cell.id, attempt=child.attempt, seconds=seconds)
        return True
    run.event("cell_failed", cell=child.cell.id, attempt=child.attempt, error=error, kind="WdmoeError")
    on_progress(f"   {child.cell} failed: {error}")
    return False
