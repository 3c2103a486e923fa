"""Runs what a foreign checkpoint may make endless or huge in a process with limits on time and memory.

A chat template is a program, a tokenizer may hold any expression, and numbers in config.json size a model.
"""

import multiprocessing
import os
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

from exporter.errors import CheckpointError

LOAD_S = 300.0
"""Deadline for importing transformers and for the first stage, which take minutes on a slow card."""
_CPU_S = 400
_MEMORY_BYTES = 4 << 30
_MAX_REASON = 300
T = TypeVar("T")


class RefusedError(Exception):
    """The message says what is wrong with a checkpoint; `run_limited` raises it as a `CheckpointError`."""


class Report:
    """What the work in the limited process tells its parent while it runs."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def stage(self, name: str, deadline_s: float) -> None:
        """A new stage begins, which must end within `deadline_s`."""
        self._pipe.send(("stage", (name, deadline_s)))

    def note(self, text: str) -> None:
        """Something that is no reason to refuse the checkpoint."""
        self._pipe.send(("note", text))


def run_limited(work: Callable[..., T], *args: object, stage: str, checkpoint: Path) -> tuple[T, list[str]]:
    """Call `work(report, *args)` in a process of its own.

    Args:
        work: a function of a module; what it returns can be pickled.
        stage: what is tried first, for messages.
        checkpoint: named in messages.

    Returns:
        What `work` returned, and its notes.

    Raises:
        CheckpointError: `work` raised `RefusedError`, did not end in time, or needed too much memory.
    """
    context = multiprocessing.get_context("forkserver")
    # What takes seconds to import is imported once, by the process from which the others are forked.
    context.set_forkserver_preload(["exporter.checkpoint.imported_once"])
    pipe, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(theirs, work, args), daemon=True)
    process.start()
    theirs.close()
    deadline_s = LOAD_S
    notes: list[str] = []
    try:
        while True:
            if not pipe.poll(deadline_s):
                raise CheckpointError(
                    f"{checkpoint}: its {stage} does not end within {deadline_s:.0f} s: repair or remove it"
                )
            kind, content = pipe.recv()
            if kind == "stage":
                stage, deadline_s = content
            elif kind == "note":
                notes.append(f"{checkpoint}: {content}")
            elif kind == "failed":
                raise CheckpointError(f"{checkpoint}: {content}")
            else:
                return content, notes
    except EOFError:
        process.join(LOAD_S)
        raise CheckpointError(
            f"{checkpoint}: its {stage} ended the process that tried it (exit code {process.exitcode}): it is damaged, "
            "or needs too much memory"
        ) from None
    finally:
        process.kill()
        process.join()
        pipe.close()


def _serve(pipe: Connection, work: Callable[..., object], args: tuple[object, ...]) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S))
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    # Libraries print warnings; what matters here is sent.
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    try:
        result = work(Report(pipe), *args)
    except RefusedError as error:
        pipe.send(("failed", str(error)))
    else:
        pipe.send(("done", result))


def reason(error: BaseException) -> str:
    """An error's message in one line, with its type where the message alone says little."""
    line = " ".join(str(error).split())
    text = line if isinstance(error, ValueError | OSError) and line else f"{type(error).__name__}: {line}"
    return text.rstrip(": ")[:_MAX_REASON]
