"""Real-time priority: one thread gets it, its children do not; a refusal is said in words."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from common import real_time

REFUSED = real_time.why_not()
needs_permission = pytest.mark.skipif(bool(REFUSED), reason=f"no real-time priority here: {REFUSED}")

# In a process of its own: two cores, no niceness, no permission.
UNPRIVILEGED = """
import os, resource
from common import real_time
os.sched_getaffinity = lambda process: {0, 1}
if os.getuid() == 0:
    os.setpriority(os.PRIO_PROCESS, 0, 0)
resource.setrlimit(resource.RLIMIT_RTPRIO, (0, 0))
if os.getuid() == 0:
    os.setuid(65534)
"""


def _policy() -> int:
    return os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK


def _in_thread(work: Callable[[], object]) -> None:
    """Run in a thread of its own: that of the tests keeps its policy and its flags."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result(60)


def _is_normal() -> None:
    assert _policy() == os.SCHED_OTHER


def _unprivileged(code: str) -> str:
    """What code prints without permission."""
    argv = [sys.executable, "-c", UNPRIVILEGED + code]
    return subprocess.check_output(argv, text=True, timeout=60).strip()


@needs_permission
def test_a_thread_gets_the_lowest_real_time_priority_and_its_children_do_not() -> None:
    def work() -> None:
        with real_time.raised():
            assert (_policy(), os.sched_getparam(0).sched_priority) == (os.SCHED_RR, 1)
            _in_thread(_is_normal)
            child = "import os; print(os.sched_getscheduler(0) == os.SCHED_OTHER)"
            assert subprocess.check_output([sys.executable, "-c", child], text=True).strip() == "True"
            with real_time.lowered():
                _is_normal()
            assert _policy() == os.SCHED_RR
            with real_time.raised():
                pass
            assert _policy() == os.SCHED_RR  # The inner context gave nothing, so it takes nothing.
        _is_normal()

    _in_thread(work)


@needs_permission
def test_a_policy_from_outside_stays() -> None:
    def work() -> None:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        assert "started with SCHED_BATCH" in real_time.why_not()
        with real_time.raised():
            assert _policy() == os.SCHED_BATCH
        with real_time.lowered():
            assert _policy() == os.SCHED_BATCH

        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        assert real_time.why_not() == ""
        with real_time.raised(), real_time.lowered():
            assert _policy() == os.SCHED_FIFO

    _in_thread(work)


@pytest.mark.parametrize(
    ("refused", "error", "why"),
    [
        ("sched_getscheduler", errno.ENOSYS, "no real-time priorities"),
        ("sched_setscheduler", errno.EINVAL, "not permitted"),
    ],
)
def test_a_system_that_refuses_has_none(monkeypatch: pytest.MonkeyPatch, refused: str, error: int, why: str) -> None:
    def refuse(*_: object) -> int:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr(os, "getpriority", lambda which, process: 0)
    monkeypatch.setattr(os, refused, refuse)
    assert why in real_time.why_not()
    with real_time.raised(), real_time.lowered():
        assert not real_time.raise_thread()


def test_a_thread_that_has_ended_gets_none() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait(60)
    assert not real_time.raise_thread(child.pid)
    assert not real_time.lower_thread(child.pid)


@pytest.mark.skipif(
    os.getuid() != 0 and os.getpriority(os.PRIO_PROCESS, 0) > 0, reason="started with a niceness, another reason"
)
def test_without_permission_it_says_so_and_goes_on() -> None:
    assert "not permitted: it needs a limit RTPRIO" in _unprivileged("print(real_time.why_not())")
    assert _unprivileged("with real_time.raised(): print(real_time.raise_thread())") == "False"


def test_what_was_started_with_a_niceness_does_not_come_first() -> None:
    assert "niceness" in _unprivileged("os.nice(3); print(real_time.why_not())")


def test_a_single_core_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    assert "a single core" in real_time.why_not()
