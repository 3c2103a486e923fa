"""Reading with a draft model in the background during a step."""

from collections.abc import Callable
from threading import Semaphore
from time import perf_counter

from bs_coordinator.engine.speculation.spare_time import SpareTime

_LONGEST_WAIT_S = 60.0
"""After this time without a wait, the background thread is given back: the step hangs, or its end was not reported."""


class ReadAhead:
    """Reads texts in another thread; a `WaitListener`.

    Each is read when a wait for nodes begins that is expected to be long enough. With cores to spare, texts are read
    from the first wait until the step ends.

    Attributes:
        reads: number of texts read.
    """

    def __init__(
        self, read: Callable[[], bool], start: Callable[[Callable[[], None]], None], spare: SpareTime, *,
        spare_cores: bool = False, clock: Callable[[], float] = perf_counter,
    ) -> None:  # fmt: skip
        """Nothing is read before the first wait.

        Args:
            read: reads the next text; False if there is none.
            start: runs a function in the background.
            spare: knows how long reads and waits take.
            spare_cores: whether the trunk has cores of its own while the model reads.
            clock: seconds.
        """
        self.reads = 0
        self._read, self._start, self._spare, self._clock = read, start, spare, clock
        self._spare_cores = spare_cores
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
        """Let the thread finish what it reads, and begin no more unless there are cores to spare."""
        self._waiting = False
        self._spare.observe_wait(self._clock() - self._began_s)

    def step_ends(self) -> None:
        """Let the thread go."""
        self._over = True
        self._waits.release()

    def _run(self) -> None:
        """Read until the step ends or nothing is worth reading."""
        while self._waits.acquire(timeout=_LONGEST_WAIT_S) and not self._over:
            while self._may_begin():
                if self.reads >= self._spare.most_reads or not self._read():
                    return
                self.reads += 1

    def _may_begin(self) -> bool:
        if self._over:
            return False
        return self._spare_cores or (self._waiting and self._spare.fits(self._clock() - self._began_s))
