"""What the answering thread does when something breaks that nobody foresaw."""

import queue
from typing import Any

import pytest

from bs_coordinator.config import SamplingConfig
from bs_coordinator.errors import BusyError
from bs_coordinator.http.answer_server import AnswerServer, StreamUpdate


class _Scheduler:
    """Fails its first steps with what is no error of ours."""

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

    fleet = type("NodeRegistry", (), {"missing": lambda self: ()})()

    def pump(self, seconds: float) -> None:
        return

    def answer(self, ids: list[int], config: SamplingConfig) -> object:
        return object()


def test_a_defect_ends_requests_instead_of_hanging_them() -> None:
    idle: Any = _Idle()
    scheduler: Any = _Scheduler()
    server = AnswerServer(scheduler, lambda: idle, max_waiting=0, dispatcher=idle)
    news: queue.Queue[StreamUpdate] = queue.Queue()
    server.submit([1], SamplingConfig(), news.put)
    with pytest.raises(BusyError):
        server.submit([1], SamplingConfig(), news.put)
    server.start()
    try:
        for _ in range(3):
            error = news.get(timeout=10).error
            assert error is not None
            assert "not foreseen" in str(error)
            assert server.load().requests == 0
            server.submit([1], SamplingConfig(), news.put)
    finally:
        server.stop()
