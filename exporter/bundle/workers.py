"""Exports trunk and experts in several processes, which end when their parent ends, whatever the reason.

The standard library's pool waits for running jobs at its end, which would delay Ctrl-C by seconds with large experts.
Here workers are ended at once, and a worker that dies (out of memory, killed) is reported instead of waited for.
"""

import multiprocessing
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from common.errors import WdmoeError
from common.parent_death import end_with_parent
from exporter.bundle.trunk import TrunkJob, copy_tensors
from exporter.expert.expert import ExpertJob, export_expert
from wire.manifest import ExpertEntry, FileEntry

Job = ExpertJob | TrunkJob
Result = ExpertEntry | FileEntry
"""Of an expert, or of the trunk's tensors."""

_PROCESS_BYTES = 160 << 20
"""RAM of a process with its libraries, before it exports anything."""
_PER_FILE_BYTE = 2.5
"""RAM per byte of an expert's file while it is written and tried: onnxruntime maps it and repacks the weights. Measured
at Mixtral-8x7B's size in int4: 300 to 370 MiB in all for files of 113 MB."""
_JOIN_S = 5.0


def processes_that_fit(processes: int, file_bytes: int, available_bytes: int, *, more_bytes: int = 0) -> int:
    """How many processes can export at once without running out of RAM: at most `processes`, at least one.

    Args:
        file_bytes: size of an expert's file.
        available_bytes: RAM that may be used.
        more_bytes: RAM of each process besides, for a calibration.
    """
    each = _PROCESS_BYTES + int(_PER_FILE_BYTE * file_bytes) + more_bytes
    return max(1, min(processes, available_bytes // each))


@contextmanager
def export_all(work: Sequence[Job], processes: int) -> Iterator[Iterator[Result]]:
    """Results of finished jobs, in the order in which they finish.

    Processes begin at once, and end with the context. With `processes` 1, this process does all the work, each job when
    its result is asked for.

    Raises:
        WdmoeError: a job failed, or a worker died.
    """
    if processes == 1 or len(work) <= 1:
        yield map(_export, work)
        return
    todo = list(reversed(work))
    workers: dict[Connection, _Worker] = {}
    try:
        for _ in range(min(processes, len(work))):
            worker = _Worker()
            workers[worker.pipe] = worker
            worker.give(todo.pop())
        yield _results(workers, todo)
    finally:
        for worker in workers.values():
            worker.end()


def _results(workers: dict[Connection, "_Worker"], todo: list[Job]) -> Iterator[Result]:
    """Results of busy workers, which are given what is still to do, the last first, and ended after that."""
    while workers:
        for pipe in wait(list(workers)):
            worker = workers[pipe]  # type: ignore[index]
            yield worker.take()
            if todo:
                worker.give(todo.pop())
            else:
                del workers[worker.pipe]
                worker.end()


def _export(job: Job) -> Result:
    if isinstance(job, TrunkJob):
        return copy_tensors(job)
    if job.quantisation.backend == "optimum":
        from exporter.expert.optimum_backend import export_expert_with_optimum

        return export_expert_with_optimum(job)
    return export_expert(job)


class _Worker:
    """One worker process, and the pipe to it."""

    def __init__(self) -> None:
        # spawn, because a fork would inherit onnxruntime's and BLAS's threads in an undefined state.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._busy = ""
        self._process: SpawnProcess = context.Process(target=_serve, args=(theirs,), daemon=True)
        with _sigint_ignored():
            self._process.start()
        theirs.close()

    def give(self, job: Job) -> None:
        self._busy = "the trunk" if isinstance(job, TrunkJob) else f"expert {job.id}"
        with suppress(BrokenPipeError):  # the worker died: `take` reports it
            self.pipe.send(job)

    def take(self) -> Result:
        """The result of the worker's last job."""
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(_JOIN_S)
            raise WdmoeError(
                f"the process that exported {self._busy} ended unexpectedly (exit code "
                f"{self._process.exitcode}, -9 usually means out of memory): try --jobs 1"
            ) from None
        if isinstance(answer, ExpertEntry | FileEntry):
            return answer
        if isinstance(answer, BaseException):
            raise answer
        raise WdmoeError(f"exporting {self._busy} failed: {answer}")

    def end(self) -> None:
        self.pipe.close()
        self._process.terminate()
        self._process.join(_JOIN_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@contextmanager
def _sigint_ignored() -> Iterator[None]:
    """Ignore SIGINT, for children to inherit: a terminal sends it to the whole group, but the parent ends its
    workers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _serve(pipe: Connection) -> None:
    """Run a worker process: receive jobs, send results or errors, until the pipe closes."""
    end_with_parent()
    with suppress(EOFError, ConnectionError):  # reset, if the parent has left an answer unread
        while True:
            job: Job = pipe.recv()
            try:
                answer: object = _export(job)
            except WdmoeError as error:
                answer = error
            except Exception as error:  # noqa: BLE001 - reported by the parent
                traceback.print_exc()
                answer = f"{type(error).__name__}: {error}"
            pipe.send(answer)
