"""Waiting for other threads and processes: for an event and not for a time, so that a busy machine changes nothing."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
PATIENCE_S = 300.0
"""Far more than what tests wait for takes on a busy machine: it ends only a test that hangs."""


def wait_until(condition: Callable[[], T], what: str = "", *, poll_s: float = 0.05) -> T:
    """Ask again and again until the answer is true, and return it.

    Args:
        what: describes what is waited for.

    Raises:
        AssertionError: it was not true within `PATIENCE_S`.
    """
    deadline_s = time.monotonic() + PATIENCE_S
    while not (answer := condition()):
        assert time.monotonic() < deadline_s, f"waited {PATIENCE_S:.0f} s for {what or condition}"
        time.sleep(poll_s)
    return answer
