"""Answers for many callers at once: one thread owns the model, the rest hand it requests and take tokens.

What can't be served soon is refused at once, with a time to come back: a caller that waits in a line without end
can't tell a busy server from a dead one.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from bs_coordinator.config import SamplingConfig
from bs_coordinator.dispatch.dispatcher import Dispatcher
from bs_coordinator.engine.scheduler import Progress, Scheduler
from bs_coordinator.engine.sequence import GeneratedAnswer, Sequence, TokenEvent
from bs_coordinator.errors import BusyError
from common.errors import WdmoeError
from wire.errors import BrokerError

log = logging.getLogger(__name__)

_IDLE_S = 0.02
_AGAIN_S = 1.0
_FIRST_ANSWER_S = 10.0
_MEMORY = 0.8


class StreamUpdate(NamedTuple):
    """What a step did for a request: new tokens, or the error that ended it."""

    events: list[TokenEvent]
    error: WdmoeError | None = None


class Request(NamedTuple):
    """One accepted request.

    Attributes:
        deliver: called from the serving thread with everything new; must not wait.
    """

    ids: list[int]
    sampling: SamplingConfig
    deliver: Callable[[StreamUpdate], None]
    accepted_s: float


class Load(NamedTuple):
    """What the server is at.

    Attributes:
        requests: accepted and not done.
        stalled_s: since something came of them; 0 when there are none.
        lost: why the experts can't be asked just now; empty while they can.
    """

    requests: int
    stalled_s: float
    lost: str


class AnswerServer:
    """Steps all accepted requests together until it is stopped."""

    def __init__(
        self, scheduler: Scheduler, new_sequence: Callable[[], Sequence], *, max_waiting: int,
        dispatcher: Dispatcher,
    ) -> None:  # fmt: skip
        """Nothing runs yet.

        Args:
            max_waiting: accepted requests beyond those that the scheduler steps at once.
            dispatcher: kept connected while there is nothing to do.
        """
        self._scheduler = scheduler
        self._new_sequence = new_sequence
        self._limit = scheduler.max_live + max_waiting
        self._dispatcher = dispatcher
        self._lock = threading.Lock()
        self._inbox: deque[Request] = deque()
        self._cancelled: deque[Request] = deque()
        self._requests: dict[int, tuple[Request, GeneratedAnswer | None]] = {}
        self._progress_s = time.monotonic()
        self._answer_s = _FIRST_ANSWER_S
        self._lost = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="answers")

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def stop(self) -> None:
        """Give up what is not done, and return when the model is no longer used."""
        self._stop.set()
        self._thread.join()

    def submit(self, ids: list[int], sampling: SamplingConfig, deliver: Callable[[StreamUpdate], None]) -> Request:
        """Accept a request, from any thread.

        Raises:
            BusyError: as many as are allowed have been accepted already.
        """
        request = Request(ids, sampling, deliver, time.monotonic())
        with self._lock:
            if len(self._requests) >= self._limit or self._stop.is_set():
                # Those ahead leave `max_live` at a time.
                rounds = math.ceil((len(self._requests) - self._scheduler.max_live + 1) / self._scheduler.max_live)
                raise BusyError(len(self._requests), retry_after_s=max(1.0, rounds * self._answer_s))
            if not self._requests:
                self._progress_s = time.monotonic()
            self._requests[id(request)] = (request, None)
            self._inbox.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Forget a request, from any thread; nothing happens if it is done."""
        self._cancelled.append(request)

    def load(self) -> Load:
        """For health checks."""
        with self._lock:
            stalled_s = time.monotonic() - self._progress_s if self._requests else 0.0
            return Load(len(self._requests), stalled_s, self._lost)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._take()
                if self._scheduler.idle:
                    self._wait()
                    continue
                for progress in self._scheduler.step():
                    self._hand_out(progress)
            except Exception:
                # A defect of ours. Nobody may wait for ever because of it, and the next request may fare better.
                log.exception("a step failed in a way that was not foreseen")
                self._give_up_all("the server failed in a way that was not foreseen: see its log")
        self._give_up_all("the server was stopped")

    def _wait(self) -> None:
        try:
            self._dispatcher.pump(_IDLE_S)
            missing = self._dispatcher.registry.missing()
            self._lost = self._dispatcher.registry.describe_missing() if missing else ""
        except BrokerError as error:
            self._lost = str(error)
            try:
                self._dispatcher.recover(error)
            except BrokerError as still:
                log.warning("%s", still)
                self._stop.wait(_AGAIN_S)

    def _take(self) -> None:
        while self._inbox:
            request = self._inbox.popleft()
            try:
                answer = self._new_sequence().answer(request.ids, request.sampling)
            except (WdmoeError, ValueError) as error:
                self._forget(request)
                wrong = error if isinstance(error, WdmoeError) else WdmoeError(str(error))
                request.deliver(StreamUpdate([], wrong))
                continue
            with self._lock:
                self._requests[id(request)] = (request, answer)
            self._scheduler.add(answer)
        while self._cancelled:
            request = self._cancelled.popleft()
            _, cancelled = self._requests.get(id(request), (request, None))
            if cancelled is not None:
                self._scheduler.cancel(cancelled)
            self._forget(request)

    def _hand_out(self, progress: Progress) -> None:
        with self._lock:
            request = next((r for r, answer in self._requests.values() if answer is progress.answer), None)
        if request is None:
            return
        self._progress_s = time.monotonic()
        if progress.error or progress.answer.done:
            self._forget(request)
            if not progress.error:
                took_s = time.monotonic() - request.accepted_s
                self._answer_s = _MEMORY * self._answer_s + (1 - _MEMORY) * took_s
        request.deliver(StreamUpdate(progress.events, progress.error))

    def _give_up_all(self, why: str) -> None:
        with self._lock:
            given_up = list(self._requests.values())
            self._requests.clear()
            self._inbox.clear()
        for request, answer in given_up:
            if answer is not None:
                self._scheduler.cancel(answer)
            request.deliver(StreamUpdate([], WdmoeError(why)))

    def _forget(self, request: Request) -> None:
        with self._lock:
            self._requests.pop(id(request), None)
