"""Clocks as an argument: code that measures or waits takes a `Clock`, so that tests can move time by hand."""

import threading
import time
from typing import Protocol


class Clock(Protocol):
    """The clocks that this project reads, and waiting on them."""

    def monotonic_s(self) -> float:
        """Seconds since an arbitrary start; never goes backwards. For deadlines."""

    def perf_ns(self) -> int:
        """Nanoseconds since an arbitrary start, at the best resolution there is. For durations."""

    def unix_ns(self) -> int:
        """Nanoseconds since 1970-01-01 UTC, by the system's wall clock. For time stamps."""

    def sleep_s(self, seconds: float) -> None:
        """Return after `seconds`; at once if that is not positive."""

    def wait(self, waiter: threading.Event | threading.Condition, timeout_s: float) -> bool:
        """Wait until another thread sets or notifies `waiter`, for at most `timeout_s`.

        Returns:
            False if the time ran out.
        """


class SystemClock:
    """The operating system's clocks."""

    monotonic_s = staticmethod(time.monotonic)
    perf_ns = staticmethod(time.perf_counter_ns)
    unix_ns = staticmethod(time.time_ns)

    def sleep_s(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(max(0.0, seconds))

    def wait(self, waiter: threading.Event | threading.Condition, timeout_s: float) -> bool:
        """Wait for another thread."""
        return waiter.wait(timeout_s)


SYSTEM_CLOCK = SystemClock()


class ManualClock:
    """Stands still until it is advanced. `sleep_s` advances it and returns at once. For one thread."""

    def __init__(self, unix_ns: int = 1_700_000_000_000_000_000) -> None:
        """Start at `unix_ns` on the wall clock, and at zero on the other two."""
        self._start_unix_ns = unix_ns
        self._elapsed_ns = 0

    def monotonic_s(self) -> float:
        """Seconds that this clock was advanced by so far."""
        return self._elapsed_ns / 1e9

    def perf_ns(self) -> int:
        """Nanoseconds that this clock was advanced by so far."""
        return self._elapsed_ns

    def unix_ns(self) -> int:
        """The start, plus what this clock was advanced by."""
        return self._start_unix_ns + self._elapsed_ns

    def sleep_s(self, seconds: float) -> None:
        """Advance by `seconds` if that is positive."""
        self.advance_ns(round(max(0.0, seconds) * 1e9))

    def wait(self, waiter: threading.Event | threading.Condition, timeout_s: float) -> bool:
        """Advance by `timeout_s`, as no other thread could end the wait; True if `waiter` is an event that is set."""
        if isinstance(waiter, threading.Event) and waiter.is_set():
            return True
        self.sleep_s(timeout_s)
        return False

    def advance_ns(self, ns: int) -> None:
        """Move time forward by `ns` nanoseconds.

        Raises:
            ValueError: `ns` is negative.
        """
        if ns < 0:
            raise ValueError(f"a clock can't go back by {-ns} ns: advance it by 0 or more")
        self._elapsed_ns += ns
