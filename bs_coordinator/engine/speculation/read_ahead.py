"""Reading with a draft model in the background while a step waits for nodes."""

from collections.abc import Callable
from threading import Semaphore
from time import perf_counter

from bs_coordinator.engine.speculation.spare_time import SpareTime

_LONGEST_WAIT_S = 60.0
"""After this time without a wait, the background thread is given back: the step hangs, or its end was not reported."""


class ReadAhead:
    """Reads texts in another thread, each when a wait begins that is expected to be long enough; a `WaitListener`.

    Attributes:
        reads: number of texts read.
    """

    def __init__(
        self, read: Callable[[], bool], start: Callable[[Callable[[], None]], None], spare: SpareTime, *,
        clock: Callable[[], float] = perf_counter,
    ) -> None:  # fmt: skip
        """Nothing is read before the first wait.

        Args:
            read: reads the next text; False if there is none.
            start: runs a function in the background.
            spare: knows how long reads and waits take.
            clock: seconds.
        """
        self.reads = 0
        self._read, self._start, self._spare, self._clock = read, start, spare, clock
        self._waits = Semaphore(0)
        self._began_s = 0.0
        self._waiting = self._started = self._over = False

    def wait_begins(self) -> None:
        """Let the thread read."""
        self._began_s = self._clock()
        self._waiting = True
        self._waits.release()
        if not self._started:
            self._started = True
            self._start(self._run)

    def wait_ends(self) -> None:
        """Let the thread finish what it reads, but begin no more."""
        self._waiting = False
        self._spare.observe_wait(self._clock() - self._began_s)

    def step_ends(self) -> None:
        """Let the thread go."""
        self._over = True
        self._waits.release()

    def _run(self) -> None:
        """Read during the waits until the step ends or nothing is worth reading."""
        while self._waits.acquire(timeout=_LONGEST_WAIT_S):
            while self._waiting and self._spare.fits(self._clock() - self._began_s):
                if self.reads >= self._spare.most_reads:
                    return
                if self._over or not self._read():
                    return
                self.reads += 1
            if self._over:
                return
