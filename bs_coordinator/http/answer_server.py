"""Answers for many callers at once: one thread owns the model; others submit requests and receive tokens.

A request that would wait long is refused at once with a time to retry: a caller in an endless queue can't tell a busy
server from a dead one.
"""

import logging
import math
import threading
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import NamedTuple

from bs_coordinator.config import SamplingConfig
from bs_coordinator.dispatch.dispatcher import Dispatcher
from bs_coordinator.engine.scheduler import Progress, Scheduler
from bs_coordinator.engine.sequence import GeneratedAnswer, Sequence
from bs_coordinator.errors import AnswerError, BusyError
from bs_coordinator.http.observers import AnswerObserver
from bs_coordinator.http.requests import NO_TRACE, Request, SharedPrompt, StreamUpdate, TraceHeaders
from bs_coordinator.selection import Policy
from common.clock import SYSTEM_CLOCK, Clock
from common.errors import WdmoeError, one_line
from common.moving_average import MovingAverage
from wire.errors import BrokerError

log = logging.getLogger(__name__)

_IDLE_S = 0.02
_RECONNECT_S = 1.0
_FIRST_ANSWER_S = 10.0
"""Assumed duration of an answer before any was finished."""
_MEMORY = 0.8
"""Weight of earlier answers in the moving average of their durations."""


class Load(NamedTuple):
    """State of the server, for health checks.

    Attributes:
        requests: accepted and not finished.
        stalled_s: seconds since the last progress of any of them; 0 when there are none.
        lost: why experts can't be reached now; empty while they can.
    """

    requests: int
    stalled_s: float
    lost: str


class AnswerServer:
    """Steps all accepted requests together until it is stopped."""

    def __init__(
        self, scheduler: Scheduler, new_sequence: Callable[[], Sequence], *, max_waiting: int,
        dispatcher: Dispatcher, observers: Seq[AnswerObserver] = (), clock: Clock = SYSTEM_CLOCK,
    ) -> None:  # fmt: skip
        """Nothing runs before `start`.

        Args:
            max_waiting: accepted requests beyond those that the scheduler steps at once.
            dispatcher: kept connected while there is nothing to do.
            observers: are shown every request.
            clock: for durations of answers and stalls.
        """
        self._clock = clock
        self._scheduler = scheduler
        self._new_sequence = new_sequence
        self._limit = scheduler.max_live + max_waiting
        self._dispatcher = dispatcher
        self._observers = tuple(observers)
        self._lock = threading.Lock()
        self._inbox: deque[tuple[Request, list[int]]] = deque()
        self._cancelled: deque[Request] = deque()
        self._requests: dict[int, tuple[Request, GeneratedAnswer | None]] = {}
        self._progress_s = self._clock.monotonic_s()
        self._answer_s = MovingAverage(_MEMORY, _FIRST_ANSWER_S)
        self._lost = ""
        self._stop = threading.Event()
        # A program that does not stop the server must still be able to end.
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)

    def start(self) -> None:
        """Start the serving thread."""
        self._thread.start()

    def stop(self) -> None:
        """End all running requests with an error, and return when the model is no longer used."""
        self._stop.set()
        with self._dispatcher.no_reconnecting():
            self._thread.join()

    def accept(
        self, sampling: SamplingConfig, deliver: Callable[[StreamUpdate], None], *, same_text: bool = False,
        successor: bool = False, policy: Policy | None = None, trace: TraceHeaders = NO_TRACE,
        shared: SharedPrompt | None = None,
    ) -> Request:  # fmt: skip
        """Give a request its place, from any thread, before its prompt is tokenised; `submit` or `cancel` must follow.

        Args:
            sampling: how to choose the answer's tokens.
            deliver: called from the serving thread with each update; must not block.
            same_text: the answer continues the prompt's text, as for `Sequence.answer`.
            policy: as `Request.policy`. Such an answer has no drafts: with most policies, experts depend on the
                tokens of a step.
            successor: the request takes the place of one that has just ended, even if another caller has taken it.
            trace: the caller's, for observers.
            shared: of this prompt's requests; all but the first are submitted once that one has had a token.

        Raises:
            BusyError: there are too many requests already, or the server is being stopped.
        """
        request = Request(sampling, deliver, self._clock.monotonic_s(), same_text, policy, trace, shared)
        with self._lock:
            busy = self._take_place(request, None if successor else self._limit)
        if busy is None:
            return request
        self._observe(lambda observer: observer.refused(busy))
        raise busy

    def submit(self, request: Request, ids: list[int]) -> None:
        """Start an accepted request with the tokens of its prompt, from any thread; nothing happens if it was ended."""
        self._inbox.append((request, ids))

    def cancel(self, request: Request) -> None:
        """Drop a request, from any thread; nothing happens if it is finished."""
        self._cancelled.append(request)

    def ahead(self, request: Request) -> int:
        """How many accepted requests have to end before this one is answered, from any thread; 0 if none."""
        with self._lock:
            earlier = next((i for i, key in enumerate(self._requests) if key == id(request)), 0)
        return max(0, earlier + 1 - self._scheduler.max_live)

    @property
    def most_at_once(self) -> int:
        """How many requests are answered at once."""
        return self._scheduler.max_live

    @property
    def free_places(self) -> int:
        """How many requests could begin to be answered at once, from any thread; others may take the places first."""
        with self._lock:
            return max(0, self._scheduler.max_live - len(self._requests))

    def load(self) -> Load:
        """The present state, from any thread."""
        with self._lock:
            stalled_s = self._clock.monotonic_s() - self._progress_s if self._requests else 0.0
            return Load(len(self._requests), stalled_s, self._lost)

    def _take_place(self, request: Request, limit: int | None) -> BusyError | None:
        if (limit is not None and len(self._requests) >= limit) or self._stop.is_set():
            # Those ahead leave `max_live` at a time.
            rounds = math.ceil((len(self._requests) - self._scheduler.max_live + 1) / self._scheduler.max_live)
            return BusyError(len(self._requests), retry_after_s=max(1.0, rounds * self._answer_s.value))
        if not self._requests:
            self._progress_s = self._clock.monotonic_s()
        self._requests[id(request)] = (request, None)
        self._observe(lambda observer: observer.accepted(request))
        return None

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._update_requests()
                if self._scheduler.idle:
                    self._wait()
                else:
                    for progress in self._scheduler.step():
                        self._deliver(progress)
                    self._lost = self._dispatcher.describe_lost()
                self._observe(lambda observer: observer.polled())
            except Exception:
                # A bug must not leave callers waiting for ever; the next request may work.
                log.exception("a step failed with an unexpected error")
                self._fail_all("an unexpected error: see the server's log")
        self._fail_all("the server was stopped")

    def _wait(self) -> None:
        try:
            self._dispatcher.pump(_IDLE_S)
            self._lost = self._dispatcher.describe_lost()
        except BrokerError as error:
            self._lost = str(error)
            try:
                self._dispatcher.recover(error)
            except BrokerError as failure:
                log.warning("%s", failure)
                self._stop.wait(_RECONNECT_S)

    def _update_requests(self) -> None:
        while self._inbox:
            request, ids = self._inbox.popleft()
            if id(request) not in self._requests:
                continue
            try:
                sequence = self._sequence(request.shared)
                if request.policy is not None:
                    sequence.drafter = None
                answer = sequence.answer(
                    ids, request.sampling, same_text=request.same_text, policy=request.policy
                )  # fmt: skip
            except Exception as error:  # noqa: BLE001 - libraries raise anything, and it is this caller's alone
                wrong = (
                    error if isinstance(error, WdmoeError) else AnswerError(f"this answer failed: {one_line(error)}")
                )
                self._end(request, wrong)
                self._tell(request, StreamUpdate([], wrong))
                continue
            with self._lock:
                self._requests[id(request)] = (request, answer)
            self._scheduler.add(answer)
        while self._cancelled:
            request = self._cancelled.popleft()
            _, cancelled = self._requests.get(id(request), (request, None))
            if cancelled is not None:
                self._scheduler.cancel(cancelled)
            self._end(request, None)

    def _sequence(self, shared: SharedPrompt | None) -> Sequence:
        if shared is None:
            return self._new_sequence()
        if shared.sequence is not None:
            return shared.sequence.fork()
        shared.sequence = self._new_sequence()
        return shared.sequence

    def _deliver(self, progress: Progress) -> None:
        with self._lock:
            request = next((r for r, answer in self._requests.values() if answer is progress.answer), None)
        if request is None:
            return
        self._progress_s = self._clock.monotonic_s()
        self._observe(lambda observer: observer.progressed(request, progress))
        if progress.error or progress.answer.done:
            self._end(request, progress.error)
            if not progress.error:
                took_s = self._clock.monotonic_s() - request.accepted_s
                self._answer_s.add(took_s)
        if not self._tell(request, StreamUpdate(progress.events, progress.error)):
            self._scheduler.cancel(progress.answer)
            self._end(request, None)

    def _fail_all(self, why: str) -> None:
        with self._lock:
            given_up = list(self._requests.values())
            self._requests.clear()
            self._inbox.clear()
        for request, answer in given_up:
            if answer is not None:
                self._scheduler.cancel(answer)
            self._give_up(request, WdmoeError(why))

    def _give_up(self, request: Request, error: WdmoeError) -> None:
        self._observe(lambda observer: observer.ended(request, error))
        self._tell(request, StreamUpdate([], error))

    def _tell(self, request: Request, update: StreamUpdate) -> bool:
        """Deliver an update; False if the caller's function failed, which must not end the other answers."""
        try:
            request.deliver(update)
        except Exception:
            log.exception("an update could not be delivered")
            return False
        return True

    def _end(self, request: Request, error: WdmoeError | None) -> None:
        """Forget a request; nothing happens if it was ended before."""
        with self._lock:
            known = self._requests.pop(id(request), None)
        if known is not None:
            self._observe(lambda observer: observer.ended(request, error))

    def _observe(self, call: Callable[[AnswerObserver], None]) -> None:
        for observer in self._observers:
            try:
                call(observer)
            except Exception:
                # A defect of an observer must not end answers, nor fill the log at every token.
                log.exception("%s failed and is no longer called", type(observer).__name__)
                self._observers = tuple(other for other in self._observers if other is not observer)
