"""`wdmoe-bs chat` on a model of its own making: an answer that fails ends neither the chat nor what was said before."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from bs_coordinator.commands import chat as command
from bs_coordinator.errors import DispatchError
from wire.errors import BrokerError


class _Station:
    """Answers every question but those that contain "fail", and loses the broker once before the first."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.recovered = 0
        self.tokenizer = SimpleNamespace(has_chat_template=True, encode_chat=self._encode)
        self.dispatcher = self

    def _encode(self, messages: list[dict[str, str]]) -> list[int]:
        self.asked.append([message["content"] for message in messages])
        return [1]

    def new_sequence(self) -> "_Station":
        return self

    def generate(self, ids: list[int], sampling: object, **kwargs: object) -> Iterator[Any]:
        yield SimpleNamespace(text="yes", steps=())
        if "fail" in self.asked[-1][-1]:
            raise DispatchError("no answer for layer 0")

    def pump(self, seconds: float) -> None:
        threading.Event().wait(0.001)
        if not self.recovered:
            raise BrokerError("lost")

    def recover(self, lost: BrokerError) -> None:
        self.recovered += 1


@pytest.mark.parametrize(("last", "code"), [("again", 0), ("fail again", DispatchError.exit_code)])
def test_a_chat_goes_on_after_an_answer_that_fails(monkeypatch: pytest.MonkeyPatch, last: str, code: int) -> None:
    station = _Station()

    @contextmanager
    def open_station(config: object) -> Iterator[_Station]:
        yield station

    monkeypatch.setattr(command, "open_station", open_station)
    done = CliRunner().invoke(
        command.chat, ["--bundle", "b", "--no-stats"], input=f"first\nthis will fail\n{last}\n"
    )  # fmt: skip
    assert done.exit_code == code, done.output
    assert station.asked == [["first"], ["first", "yes", "this will fail"], ["first", "yes", last]]
    assert station.recovered == 1
