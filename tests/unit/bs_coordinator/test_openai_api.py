"""The HTTP interface on a real socket, before a server whose answers the tests make up."""

import gc
import json
import logging
import shutil
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bs_coordinator.engine.sequence import StopReason, TokenEvent
from bs_coordinator.engine.tokenizer import Tokenizer
from bs_coordinator.errors import ContextLengthError, DispatchError
from bs_coordinator.http.answer_server import Load
from bs_coordinator.http.openai_api import http_app
from bs_coordinator.http.requests import StreamUpdate
from tests.http_site import HttpSite
from tests.waiting import wait_until

MIXTRAL_TEMPLATE = (  # of mistralai/Mixtral-8x7B-Instruct-v0.1
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)


class _Step:
    """A step's record, as far as HTTP looks into it."""

    layers = ()
    total_ns = drafted = accepted = 0


class _Answers:
    """Hands out what the test puts into `script`; keeps who was accepted and who cancelled."""

    def __init__(self) -> None:
        self.script: list[StreamUpdate] = []
        self.deliver: Any = None
        self.cancelled = threading.Event()

    def accept(self, sampling: object, deliver: Any, *, same_text: bool) -> object:
        if self.script == []:
            raise ZeroDivisionError
        self.deliver = deliver
        return self

    def submit(self, request: object, ids: list[int]) -> None:
        for news in self.script:
            self.deliver(news)

    def cancel(self, request: object) -> None:
        self.cancelled.set()

    def load(self) -> Load:
        return Load(0, 0.0, "")


def _news(text: str, stop: StopReason | None = None, step: _Step | None = None) -> StreamUpdate:
    steps: Any = (step or _Step(),)
    return StreamUpdate([TokenEvent(1, text, steps, stop)])


@pytest.fixture
def answers() -> _Answers:
    return _Answers()


@pytest.fixture
def site(answers: _Answers, tiny_model: Path, tmp_path: Path) -> Iterator[HttpSite]:
    for file in (*tiny_model.glob("*token*"), tiny_model / "config.json"):
        shutil.copy(file, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(MIXTRAL_TEMPLATE)
    server: Any = answers
    site = HttpSite(http_app(server, Tokenizer(tmp_path), model="tiny", stall_s=8))
    yield site
    site.close()


def _documents(stream: str) -> list[Any]:
    *documents, last, rest = stream.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    return [json.loads(document.removeprefix("data: ")) for document in documents]


def test_messages_that_the_template_refuses_are_a_bad_request(site: HttpSite, answers: _Answers) -> None:
    answers.script = [_news("Hi", "eos")]
    hello = {"role": "user", "content": "Hello"}
    for stream in (False, True):
        status, headers, body = site.text(
            "POST", "/v1/chat/completions", {"messages": [hello, hello], "stream": stream}
        )
        assert (status, headers["content-type"]) == (400, "application/json")
        assert "roles must alternate" in json.loads(body)["error"]["message"]
    system = {"role": "system", "content": "Be polite"}
    status, _, body = site.text("POST", "/v1/chat/completions", {"messages": [system, hello]})
    assert status == 400
    assert "it takes no system message" in json.loads(body)["error"]["message"]
    assert site.text("POST", "/v1/chat/completions", {"messages": [hello]})[0] == 200


def test_a_defect_is_told_in_json_and_logged(site: HttpSite, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        status, headers, body = site.text("POST", "/v1/completions", {"prompt": "Hello"})
        wait_until(lambda: "ZeroDivisionError" in caplog.text)
    assert (status, headers["content-type"]) == (500, "application/json")
    assert json.loads(body)["error"]["type"] == "server_error"


def test_what_fails_before_the_first_token_has_a_status_of_its_own(site: HttpSite, answers: _Answers) -> None:
    for error, expected in ((ContextLengthError("too long"), 400), (DispatchError("no answer"), 503)):
        answers.script = [StreamUpdate([]), StreamUpdate([], error)]
        for stream in (False, True):
            status, headers, body = site.text("POST", "/v1/completions", {"prompt": "Hello", "stream": stream})
            assert (status, headers["content-type"]) == (expected, "application/json")
            assert json.loads(body)["error"]["message"] == str(error)
    answers.script = [_news("He"), StreamUpdate([], DispatchError("no answer"))]
    assert site.text("POST", "/v1/completions", {"prompt": "Hello"})[0] == 503
    status, _, body = site.text("POST", "/v1/completions", {"prompt": "Hello", "stream": True})
    assert status == 200
    piece, error = _documents(body)
    assert piece["choices"][0]["text"] == "He"
    assert error["error"]["code"] == 503


def test_streams_begin_with_the_role_and_end_with_what_was_used(site: HttpSite, answers: _Answers) -> None:
    answers.script = [_news("Hel"), _news("lo"), _news("", "eos")]
    asked = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
    first, second, third = _documents(site.text("POST", "/v1/chat/completions", asked)[2])
    assert first["choices"] == [{"index": 0, "delta": {"role": "assistant", "content": "Hel"}, "finish_reason": None}]
    assert second["choices"][0]["delta"] == {"content": "lo"}
    assert third["choices"][0]["finish_reason"] == "stop"
    with_usage = site.text("POST", "/v1/chat/completions", {**asked, "stream_options": {"include_usage": True}})[2]
    *_, last = _documents(with_usage)
    assert last["choices"] == []
    assert (
        last["usage"] == json.loads(site.text("POST", "/v1/chat/completions", {**asked, "stream": False})[2])["usage"]
    )
    assert last["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_with_tools_is_answered_in_text_and_says_so(site: HttpSite, answers: _Answers, stream: bool) -> None:
    answers.script = [_news("Hi"), _news("", "eos")]
    asked = {
        "messages": [{"role": "user", "content": "Hi"}],
        "stream": stream,
        "stream_options": {"include_usage": True},
    }
    tools = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]

    def told(**more: object) -> object:
        status, _, body = site.text("POST", "/v1/chat/completions", {**asked, **more})
        assert status == 200
        documents = _documents(body) if stream else [json.loads(body)]
        assert "tool_calls" not in body
        return documents[-1]["wdmoe"].get("ignored")

    assert told(tools=tools) == ["tools"]
    assert told(tools=tools, tool_choice="none") is None
    assert told() is None
    status, _, body = site.text("POST", "/v1/chat/completions", {**asked, "tools": tools, "tool_choice": "required"})
    assert (status, "`tool_choice`" in json.loads(body)["error"]["message"]) == (400, True)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_and_frees_its_place(site: HttpSite, answers: _Answers, stream: bool) -> None:
    answers.script = [_news("One. "), _news("Two"), _news(".\n"), _news("\nThree"), _news("", "eos")]
    body = site.text("POST", "/v1/completions", {"prompt": "Hello", "stop": ["Four", "\n\n"], "stream": stream})[2]
    made = [document["choices"][0] for document in (_documents(body) if stream else [json.loads(body)])]
    assert "".join(choice["text"] for choice in made) == "One. Two."
    assert made[-1]["finish_reason"] == "stop"
    assert answers.cancelled.is_set()
    body = site.text("POST", "/v1/completions", {"prompt": "Hello", "stop": "Three!"})[2]
    assert json.loads(body)["choices"][0]["text"] == "One. Two.\n\nThree"


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_that_hangs_up_is_noticed_between_tokens(site: HttpSite, answers: _Answers, stream: bool) -> None:
    answers.script = [_news("a")]
    caller = site.send("/v1/completions", {"prompt": "Hello", "stream": stream})
    wait_until(lambda: answers.deliver, "the request")
    for _ in range(20):
        answers.deliver(_news("a"))
    # A round trip later the server has had its turn for what it was given.
    assert site.ask("GET", "/health")[0] == 200
    assert not answers.cancelled.is_set()
    caller.close()

    def cancelled() -> bool:
        answers.deliver(_news("a"))
        return answers.cancelled.is_set()

    wait_until(cancelled, "the answer to be cancelled")


def test_records_do_not_pile_up_for_a_slow_reader(site: HttpSite, answers: _Answers) -> None:
    answers.script = [_news("a")]
    with site.send("/v1/completions", {"prompt": "Hello", "stream": True}):
        wait_until(lambda: answers.deliver)
        records = []
        for _ in range(200):
            step = _Step()
            records.append(weakref.ref(step))
            # Far more than sockets hold: most of it has to wait in the base station.
            answers.deliver(_news("a" * 100_000, step=step))
        del step
        gc.collect()
        assert not any(record() for record in records)
        assert not answers.cancelled.is_set()
