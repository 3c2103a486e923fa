"""The answering thread: unexpected errors, and the load that it reports."""

import queue
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest

from bs_coordinator.config import SamplingConfig
from bs_coordinator.engine.scheduler import Progress
from bs_coordinator.errors import AnswerError, BusyError
from bs_coordinator.http.answer_server import AnswerServer, Load
from bs_coordinator.http.observers import AnswerObserver
from bs_coordinator.http.requests import Request, StreamUpdate
from common.clock import ManualClock
from tests.waiting import PATIENCE_S


def _submit(server: AnswerServer, ids: list[int], deliver: Callable[[StreamUpdate], None]) -> None:
    server.submit(server.accept(SamplingConfig(), deliver), ids)


class _Scheduler:
    """Every step fails with an error that is not one of ours."""

    max_live = 1

    def __init__(self) -> None:
        self.answers: list[object] = []

    @property
    def idle(self) -> bool:
        return not self.answers

    def add(self, answer: object) -> None:
        self.answers.append(answer)

    def cancel(self, answer: object) -> None:
        self.answers.remove(answer)

    def step(self) -> list[Any]:
        raise ZeroDivisionError


class _Idle:
    """A dispatcher with nothing to do, and a sequence whose answers are themselves."""

    def pump(self, seconds: float) -> None:
        return

    def describe_lost(self) -> str:
        return ""

    def no_reconnecting(self) -> AbstractContextManager[None]:
        return nullcontext()

    def answer(self, ids: list[int], config: SamplingConfig, *, same_text: bool, policy: object) -> object:
        return object()


def test_a_defect_ends_requests_instead_of_hanging_them() -> None:
    idle: Any = _Idle()
    scheduler: Any = _Scheduler()
    server = AnswerServer(scheduler, lambda: idle, max_waiting=0, dispatcher=idle)
    updates: queue.Queue[StreamUpdate] = queue.Queue()
    _submit(server, [1], updates.put)
    with pytest.raises(BusyError):
        _submit(server, [1], updates.put)
    server.start()
    try:
        for _ in range(3):
            error = updates.get(timeout=PATIENCE_S).error
            assert error is not None
            assert "unexpected error" in str(error)
            assert server.load().requests == 0
            _submit(server, [1], updates.put)
    finally:
        server.stop()


def test_load_and_the_time_to_retry() -> None:
    idle: Any = _Idle()
    scheduler: Any = _Scheduler()
    clock = ManualClock()
    server = AnswerServer(scheduler, lambda: idle, max_waiting=2, dispatcher=idle, clock=clock)
    clock.advance_ns(10**9)
    assert server.load() == Load(0, 0.0, "")
    for _ in range(3):
        _submit(server, [1], lambda update: None)
    clock.advance_ns(5 * 10**9)
    assert server.load() == Load(3, 5.0, "")
    with pytest.raises(BusyError, match="busy with 3 requests") as refused:
        _submit(server, [1], lambda update: None)
    # Three rounds of one answer each, ten seconds long as long as none is known.
    assert refused.value.retry_after_s == 30


def test_a_failure_ends_only_the_failing_callers_request() -> None:
    class Sequences(_Idle):
        def answer(self, ids: list[int], config: SamplingConfig, *, same_text: bool, policy: object) -> object:
            if ids == [13]:
                raise TypeError("no such\ntoken")
            return _Answer()

    class Steps(_Scheduler):
        def step(self) -> list[Any]:
            return [Progress(answer, [], None) for answer in self.answers]  # type: ignore[arg-type]

    class _Answer:
        done = False

    def hang_up(update: StreamUpdate) -> None:
        raise RuntimeError("the caller's loop is closed")

    idle: Any = Sequences()
    scheduler: Any = Steps()
    server = AnswerServer(scheduler, lambda: idle, max_waiting=3, dispatcher=idle)
    broken: queue.Queue[StreamUpdate] = queue.Queue()
    healthy: queue.Queue[StreamUpdate] = queue.Queue()
    _submit(server, [1], healthy.put)
    _submit(server, [2], hang_up)
    _submit(server, [13], broken.put)
    server.start()
    try:
        error = broken.get(timeout=PATIENCE_S).error
        assert isinstance(error, AnswerError)
        assert str(error) == "this answer failed: no such token"
        for _ in range(3):
            assert healthy.get(timeout=PATIENCE_S).error is None
        assert server.load().requests == 1
    finally:
        server.stop()


def test_observers_see_each_request_and_their_errors_are_harmless(caplog: pytest.LogCaptureFixture) -> None:
    class Answer:
        def __init__(self) -> None:
            self.done = False

    class Sequences(_Idle):
        def answer(self, ids: list[int], config: SamplingConfig, *, same_text: bool, policy: object) -> object:
            if ids == [13]:
                raise TypeError("no such token")
            return Answer()

    class Steps(_Scheduler):
        def step(self) -> list[Any]:
            answer: Any = self.answers[-1]
            answer.done = True
            self.cancel(answer)
            return [Progress(answer, [], None)]

    class Seen(AnswerObserver):
        def __init__(self) -> None:
            self.calls: list[tuple[str, object]] = []

        def accepted(self, request: Request) -> None:
            self.calls.append(("accepted", request))

        def refused(self, error: BusyError) -> None:
            self.calls.append(("refused", error.retry_after_s))

        def progressed(self, request: Request, progress: Progress) -> None:
            self.calls.append(("progressed", request))

        def ended(self, request: Request, error: object) -> None:
            self.calls.append(("ended", request if error is None else str(error)))

    class Broken(AnswerObserver):
        def progressed(self, request: Request, progress: Progress) -> None:
            raise ZeroDivisionError

        def ended(self, request: Request, error: object) -> None:
            raise AssertionError("called after it had failed")

    idle: Any = Sequences()
    scheduler: Any = Steps()
    seen = Seen()
    updates: queue.Queue[StreamUpdate] = queue.Queue()
    server = AnswerServer(scheduler, lambda: idle, max_waiting=2, dispatcher=idle, observers=(Broken(), seen))
    finished, failed, cancelled = (server.accept(SamplingConfig(), updates.put) for _ in range(3))
    with pytest.raises(BusyError):
        server.accept(SamplingConfig(), updates.put)
    server.cancel(cancelled)
    server.submit(finished, [1])
    server.start()
    try:
        assert updates.get(timeout=PATIENCE_S).error is None
        server.submit(failed, [13])
        assert updates.get(timeout=PATIENCE_S).error is not None
    finally:
        server.stop()
    assert seen.calls[:3] == [("accepted", finished), ("accepted", failed), ("accepted", cancelled)]
    assert seen.calls[3:] == [
        ("refused", 30.0),
        ("ended", cancelled),
        ("progressed", finished),
        ("ended", finished),
        ("ended", "this answer failed: no such token"),
    ]
    assert [record.message for record in caplog.records] == ["Broken failed and is no longer called"]
