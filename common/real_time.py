"""Real-time priority for the few threads that a token waits for.

Each layer of a token wakes several processes, one after the other. Beside busy processes, each of them waits for its
turn on a core; a low niceness changes little about that. A thread with real-time priority does not wait (sched(7)).

Such threads can starve what the device lives on. So only one thread of a process is raised, to the lowest real-time
priority, and not while it computes many tokens. Threads and processes that it starts do not inherit the priority. On a
single core there is none. The kernel's limit on real-time threads stays as it is.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from common.cores import usable_cores

Priority = Literal["auto", "normal"]
"""Of threads that a token waits for: real-time priority wherever that is permitted, or that of any other thread."""

LEVEL = 1
"""The lowest real-time priority."""
MOST_TOKENS = 16
"""More tokens than this at once are computed with normal priority: a prompt keeps a core busy for seconds."""


def why_not() -> str:
    """Why this process can't raise its threads; empty if it can, or if its policy was chosen outside (`chrt`)."""
    # Some C libraries have the functions, but only to refuse them (musl).
    if not hasattr(os, "sched_setscheduler") or (policy := _scheduler(0)) is None:
        return "this system has no real-time priorities"
    if usable_cores() < 2:
        return "a single core would have no time for anything else"
    if (niceness := os.getpriority(os.PRIO_PROCESS, 0)) > 0:
        return f"started with niceness {niceness}, so that others come first"
    if (policy := policy & ~os.SCHED_RESET_ON_FORK) in (os.SCHED_BATCH, os.SCHED_IDLE):
        return f"started with {'SCHED_BATCH' if policy == os.SCHED_BATCH else 'SCHED_IDLE'}, so that others come first"
    if policy != os.SCHED_OTHER:
        return ""
    if not raise_thread():
        return "not permitted: it needs a limit RTPRIO of 1 or more ('ulimit -r'), or the capability CAP_SYS_NICE"
    lower_thread()
    return ""


def raise_thread(thread: int = 0) -> bool:
    """Give a thread real-time priority; False if it has another policy than the usual one, or that is not permitted.

    Args:
        thread: its native id, which for a main thread is the process' id; 0 is the calling thread.
    """
    if _scheduler(thread) in (os.SCHED_OTHER, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK):
        # Sandboxes that know no such policy refuse it as an invalid argument.
        with suppress(OSError):
            os.sched_setscheduler(thread, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(LEVEL))
            return True
    return False


def lower_thread(thread: int = 0) -> bool:
    """Take back what `raise_thread` gave; False if a thread has its policy from elsewhere."""
    if _scheduler(thread) != os.SCHED_RR | os.SCHED_RESET_ON_FORK:
        return False
    if os.sched_getparam(thread).sched_priority != LEVEL:
        return False
    # Only with privileges could the flag be taken back as well.
    os.sched_setscheduler(thread, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0))
    return True


@contextmanager
def raised() -> Iterator[None]:
    """Raise the calling thread within the context. To be used where `why_not` has nothing against it."""
    done = raise_thread()
    try:
        yield
    finally:
        if done:
            lower_thread()


@contextmanager
def lowered() -> Iterator[None]:
    """Take the calling thread's real-time priority away within the context, if it has it from here."""
    done = hasattr(os, "sched_setscheduler") and lower_thread()
    try:
        yield
    finally:
        if done:
            raise_thread()


def _scheduler(thread: int) -> int | None:
    """A thread's policy and flags; None if the system does not tell, or the thread has ended."""
    try:
        return os.sched_getscheduler(thread)
    except OSError:
        return None
