"""`wdmoe-bs chat` on a model of its own making: an answer that fails ends neither the chat nor what was said before."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from bs_coordinator.commands import chat as command
from bs_coordinator.commands import generate as generate_command
from bs_coordinator.commands.answers import print_answer
from bs_coordinator.config import SamplingConfig
from bs_coordinator.engine.sequence import TokenEvent
from bs_coordinator.errors import ChatTemplateError, DispatchError
from wire.errors import BrokerError


class _Station:
    """Answers every question but those that contain "fail", and loses the broker once before the first."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.recovered = 0
        self.reconnecting = False
        self.tokenizer = SimpleNamespace(has_chat_template=True, encode_chat=self._encode)
        self.dispatcher = self

    def _encode(self, messages: list[dict[str, str]]) -> list[int]:
        self.asked.append([message["content"] for message in messages])
        return [1]

    def new_sequence(self) -> "_Station":
        return self

    def generate(self, ids: list[int], sampling: object, **kwargs: object) -> Iterator[Any]:
        if "interrupt" in self.asked[-1][-1]:
            signal.raise_signal(signal.SIGINT)
        yield TokenEvent(1, "yes", (), None)
        if "interrupt" in self.asked[-1][-1]:
            pytest.fail("a token after Ctrl-C")
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


def test_an_interrupt_ends_the_answer_and_not_the_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    station = _Station()

    @contextmanager
    def open_station(config: object) -> Iterator[_Station]:
        yield station

    monkeypatch.setattr(command, "open_station", open_station)
    before = signal.getsignal(signal.SIGINT)
    done = CliRunner().invoke(command.chat, ["--bundle", "b", "--no-stats"], input="interrupt this\nlast\n")
    assert done.exit_code == 0, done.output
    assert station.asked == [["interrupt this"], ["interrupt this", "yes", "last"]]
    assert signal.getsignal(signal.SIGINT) == before


def test_an_interrupt_while_the_broker_is_away_ends_the_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    station = _Station()
    station.reconnecting = True

    @contextmanager
    def open_station(config: object) -> Iterator[_Station]:
        yield station

    monkeypatch.setattr(command, "open_station", open_station)
    done = CliRunner().invoke(command.chat, ["--bundle", "b", "--no-stats"], input="interrupt this\nlast\n")
    assert done.exit_code != 0
    assert station.asked == [["interrupt this"]]


def test_a_conversation_that_the_template_refuses_later_does_not_end_the_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    station = _Station()

    def encode(messages: list[dict[str, str]]) -> list[int]:
        if "refuse" in messages[-1]["content"]:
            raise ChatTemplateError("the model's chat template refuses these messages")
        return station._encode(messages)

    @contextmanager
    def open_station(config: object) -> Iterator[_Station]:
        yield station

    station.tokenizer.encode_chat = encode
    monkeypatch.setattr(command, "open_station", open_station)
    done = CliRunner().invoke(command.chat, ["--bundle", "b", "--no-stats"], input="first\nrefuse this\nlast\n")
    assert done.exit_code == 0, done.output
    assert station.asked == [["first"], ["first", "yes", "last"]]
    done = CliRunner().invoke(command.chat, ["--bundle", "b", "--system", "Be brief"], input="refuse this\nlast\n")
    assert isinstance(done.exception, ChatTemplateError)  # nothing to keep: most likely the system message is refused


@pytest.mark.parametrize(("options", "says"), [(["--raw"], "leave out --raw"), ([], "no chat template")])
def test_a_system_prompt_that_would_have_no_effect_is_refused(
    monkeypatch: pytest.MonkeyPatch, options: list[str], says: str
) -> None:
    @contextmanager
    def open_station(config: object) -> Iterator[Any]:
        yield SimpleNamespace(tokenizer=SimpleNamespace(has_chat_template=False))

    monkeypatch.setattr(generate_command, "open_station", open_station)
    arguments = ["--bundle", "b", "--prompt", "Hi", "--system", "Be brief", *options]
    done = CliRunner().invoke(generate_command.generate, arguments)
    assert done.exit_code == 2
    assert says in done.output


@pytest.mark.parametrize(("terminal", "shown"), [(True, "\\x1b]0;own\\x07é\n\t"), (False, "\x1b]0;own\x07é\n\t")])
def test_a_models_control_characters_do_not_reach_a_terminal(
    terminal: bool, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They would set its title here; pipes and files get the text as it is."""
    answer = TokenEvent(1, "\x1b]0;own\x07é\n\t", (), None)
    sequence: Any = SimpleNamespace(generate=lambda *_args, **_options: iter([answer]))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    assert print_answer(sequence, [1], SamplingConfig(), stats=False) == answer.text
    assert capsys.readouterr().out == shown + "\n"
