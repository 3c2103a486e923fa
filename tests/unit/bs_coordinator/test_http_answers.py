"""HTTP with a real model whose experts are in this process: a full queue, callers that leave, lost experts."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.engine.scheduler import Progress, Scheduler
from bs_coordinator.engine.sequence import Sequence
from bs_coordinator.engine.tokenizer import Tokenizer
from bs_coordinator.http.access import ApiKey
from bs_coordinator.http.answer_server import AnswerServer
from bs_coordinator.http.openai_api import http_app
from bs_coordinator.selection import TopK
from bs_coordinator.trunk.load import load_trunk
from testbed.evaluation.local_experts import LocalExperts
from tests.http_site import HttpSite
from tests.waiting import PATIENCE_S, wait_until
from wire.manifest import Scheme

LIVE, WAITING = 8, 8
KEY = "open sesame"


class _Gated(Scheduler):
    """Makes no step while the gate is closed, so that a test decides how long answers take."""

    def __init__(self, model: DistributedModel) -> None:
        super().__init__(model, max_live=LIVE)
        self.gate = threading.Event()
        self.gate.set()

    def step(self) -> list[Progress]:
        return super().step() if self.gate.wait(0.02) else []


class _Nodes:
    """What the server asks of its dispatcher and registry while it is idle."""

    def __init__(self) -> None:
        self.lost = ""

    def pump(self, seconds: float) -> None:
        threading.Event().wait(seconds)

    def describe_lost(self) -> str:
        return self.lost

    def no_reconnecting(self) -> AbstractContextManager[None]:
        return nullcontext()


class _Site(HttpSite):
    """The whole HTTP interface."""

    def __init__(self, model: DistributedModel, tokenizer: Tokenizer, max_positions: int = 1 << 20) -> None:
        self.nodes = _Nodes()
        dispatcher: Any = self.nodes
        self.scheduler = _Gated(model)
        self._server = AnswerServer(
            self.scheduler, lambda: Sequence(model, tokenizer), max_waiting=WAITING, dispatcher=dispatcher
        )
        self._server.start()
        app = http_app(
            self._server,
            tokenizer,
            model="tiny",
            keys=[ApiKey("default", KEY)],
            stall_s=PATIENCE_S,
            max_positions=max_positions,
        )
        super().__init__(app, KEY)

    def close(self) -> None:
        self._server.stop()
        super().close()

    def complete(self, prompt: str, tokens: int = 12, **more: object) -> tuple[int, dict[str, str], Any]:
        return self.ask("POST", "/v1/completions", {"prompt": prompt, "max_tokens": tokens, **more})

    @property
    def requests(self) -> int:
        count: int = self.ask("GET", "/health")[2]["requests"]
        return count


@pytest.fixture(scope="module")
def model(tiny_bundle: Callable[[Scheme], Path]) -> DistributedModel:
    bundle = tiny_bundle("fp32")
    return DistributedModel(load_trunk(bundle / "trunk"), LocalExperts(bundle, threads=1), TopK(2))


@pytest.fixture(scope="module")
def tokenizer(tiny_bundle: Callable[[Scheme], Path]) -> Tokenizer:
    return Tokenizer(tiny_bundle("fp32") / "trunk")


@pytest.fixture
def site(model: DistributedModel, tokenizer: Tokenizer) -> Iterator[_Site]:
    site = _Site(model, tokenizer)
    yield site
    site.close()


def test_bad_requests_get_the_reason(site: _Site) -> None:
    for code, word, (status, _, body) in [
        (400, "prompt", site.ask("POST", "/v1/completions", {})),
        (400, "max_tokens", site.complete("x", 0)),
        (400, "stop", site.complete("x", stop=7)),
        (400, "token 100000", site.ask("POST", "/v1/completions", {"prompt": [1, 100_000]})),
        (400, "seed", site.complete("x", seed=2**63)),
        (400, "not a request", site.ask("POST", "/v1/completions", b"\xff{")),
        (400, "context", site.complete("word " * 9000)),
        (400, "context", site.complete("word " * 9000, stream=True)),
        (413, "longer", site.ask("POST", "/v1/completions", b" " * (2 << 20))),
    ]:
        assert status == code, body
        assert word in body["error"]["message"]
    site.key = "guess"
    status, _, body = site.complete("x")
    assert (status, "API key" in body["error"]["message"]) == (401, True)


def test_a_seed_repeats_an_answer(site: _Site) -> None:
    texts = [site.complete("Hello", temperature=1.5, seed=s)[2]["choices"][0]["text"] for s in (None, None, 5, 5, -5)]
    assert len(set(texts)) == 4
    assert texts[2] == texts[3]


def test_a_prompt_of_tokens_is_answered_as_its_text(site: _Site, tokenizer: Tokenizer) -> None:
    expected = site.complete("Hello")[2]["choices"]
    for prompt in (tokenizer.encode("Hello"), [tokenizer.encode("Hello")], ["Hello"]):
        assert site.ask("POST", "/v1/completions", {"prompt": prompt, "max_tokens": 12})[2]["choices"] == expected


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (f"Bearer {KEY}", 200), (f"bearer {KEY}", 200), (f"BEARER  {KEY}", 200), (KEY, 200),
        (f"Basic {KEY}", 401), ("Bearer", 401), ("Bearer x", 401), ("", 401), (f"bearer{KEY}", 401), ("Bearer é", 401),
    ],
)  # fmt: skip
def test_keys_are_taken_under_their_scheme_in_any_case(site: _Site, authorization: str, status: int) -> None:
    connection = HTTPConnection("127.0.0.1", site.port, timeout=PATIENCE_S)
    connection.request("HEAD", "/v1/models", headers={"Authorization": authorization})
    response = connection.getresponse()
    assert (response.status, response.read()) == (status, b"")
    assert response.getheader("WWW-Authenticate") == (None if status == 200 else "Bearer")
    connection.close()


def test_the_model_is_listed(site: _Site) -> None:
    (listed,) = site.ask("GET", "/v1/models")[2]["data"]
    assert abs(listed["created"] - time.time()) < 3600
    assert site.ask("GET", f"/v1/models/{listed['id']}")[2] == listed
    assert site.ask("GET", "/v1/models/another")[0] == 404


def test_excess_requests_wait_or_get_retry_after(site: _Site) -> None:
    """Of 32 callers 8 are served together, 8 wait, 16 are refused and come back when there is room."""
    alone = site.complete("Once upon a time", 24)[2]["choices"][0]["text"]
    statuses: Counter[int] = Counter()
    texts: list[str] = []
    lock = threading.Lock()

    def call() -> None:
        status, headers, body = site.complete("Once upon a time", 24)
        with lock:
            statuses[status] += 1
            if status == 200:
                texts.append(body["choices"][0]["text"])
            else:
                assert "retry after" in body["error"]["message"]
                assert float(headers["retry-after"]) >= 1

    def call_together(count: int) -> list[threading.Thread]:
        callers = [threading.Thread(target=call) for _ in range(count)]
        for caller in callers:
            caller.start()
        return callers

    site.scheduler.gate.clear()
    callers = call_together(32)
    wait_until(lambda: statuses[429] == 32 - LIVE - WAITING, "those who find no room")
    assert site.requests == LIVE + WAITING
    site.scheduler.gate.set()
    for caller in callers:
        caller.join(PATIENCE_S)
    for caller in call_together(LIVE + WAITING):
        caller.join(PATIENCE_S)
    assert statuses == {200: 32, 429: 32 - LIVE - WAITING}
    assert texts == [alone] * 32
    assert site.requests == 0


def test_refused_requests_are_not_tokenised(site: _Site, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a prompt that is longer than the context in any case."""
    encoded: list[str] = []
    encode = tokenizer.encode

    def encode_and_count(text: str, **more: Any) -> list[int]:
        encoded.append(text)
        return encode(text, **more)

    monkeypatch.setattr(tokenizer, "encode", encode_and_count)
    status, _, body = site.complete("x" * (64 << 10), 1)
    assert (status, len(encoded)) == (400, 1)
    monkeypatch.setattr(tokenizer, "longest_token", 1)
    small = _Site(site.scheduler._model, tokenizer, max_positions=1000)
    status, _, body = small.complete("x" * 1001, 1)
    small.close()
    assert (status, len(encoded)) == (400, 1)
    assert "1001 characters" in body["error"]["message"]
    site.scheduler.gate.clear()
    callers = [site.send("/v1/completions", {"prompt": "Hello", "max_tokens": 2}) for _ in range(LIVE + WAITING)]
    wait_until(lambda: len(encoded) == 1 + len(callers), "all places to be taken")
    assert site.complete("One too many")[0] == 429
    assert "One too many" not in encoded
    site.scheduler.gate.set()
    for caller in callers:
        caller.close()


def test_others_are_answered_while_a_prompt_is_tokenised(
    site: _Site, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    encode = tokenizer.encode

    def encode_slowly(text: str, **more: Any) -> list[int]:
        if text.startswith("slow"):
            begun.set()
            assert go_on.wait(PATIENCE_S)
        return encode(text, **more)

    monkeypatch.setattr(tokenizer, "encode", encode_slowly)
    with site.send("/v1/completions", {"prompt": "slow " * 9000, "max_tokens": 1}) as caller:
        assert begun.wait(PATIENCE_S)
        # A second long one waits for the first; short ones do not.
        with site.send("/v1/completions", {"prompt": "slow " * 9000, "max_tokens": 1}):
            assert site.ask("GET", "/health")[0] == 200
            assert site.complete("Hello", 2)[0] == 200
            assert site.requests >= 1
            go_on.set()
            assert caller.recv(12) == b"HTTP/1.1 400"
    wait_until(lambda: site.requests == 0, "all places to be free")


@pytest.mark.parametrize("error", [ZeroDivisionError("division by zero"), TypeError("no\nlength"), Exception("broken")])
def test_a_prompt_that_breaks_the_tokenizer_is_one_error_line(
    site: _Site, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    encode = tokenizer.encode

    def encode_or_fail(text: str, **more: Any) -> list[int]:
        if text == "bad":
            raise error
        return encode(text, **more)

    monkeypatch.setattr(tokenizer, "encode", encode_or_fail)
    before = site.complete("Hello", 4)[2]["choices"]
    for _ in range(LIVE + WAITING + 1):
        status, _, body = site.complete("bad")
        assert (status, body["error"]["message"][:25]) == (400, "this prompt can't be toke")
        assert "\n" not in body["error"]["message"]
        wait_until(lambda: site.requests == 0, "the place to be free")
    assert site.complete("Hello", 4)[2]["choices"] == before


@pytest.mark.parametrize("stream", [True, False])
def test_a_caller_that_hangs_up_frees_its_place(site: _Site, stream: bool) -> None:
    if not stream:
        site.scheduler.gate.clear()
    callers = [HTTPConnection("127.0.0.1", site.port) for _ in range(LIVE + WAITING)]
    for caller in callers:
        body = b'{"prompt": "Hello", "max_tokens": 4000, "stream": %s}' % (b"true" if stream else b"false")
        caller.request(
            "POST", "/v1/completions", body, {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        )
    wait_until(lambda: site.requests == len(callers), "all requests to be accepted")
    if stream:
        callers[0].getresponse().read(10)
    for caller in callers:
        caller.close()
    wait_until(lambda: site.requests == 0, "all places to be free")
    site.scheduler.gate.set()
    assert site.complete("Hello", 2)[0] == 200


def test_health_fails_while_experts_are_lost(site: _Site) -> None:
    assert site.ask("GET", "/health")[0] == 200
    site.nodes.lost = "no node holds L*:E1"
    wait_until(lambda: site.ask("GET", "/health")[0] == 503, "health to fail")
    assert site.ask("GET", "/health")[2]["reason"] == "no node holds L*:E1"
    site.nodes.lost = ""
    wait_until(lambda: site.ask("GET", "/health")[0] == 200, "health to be well again")
