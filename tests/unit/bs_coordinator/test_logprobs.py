"""Log-probabilities, several prompts and several choices: against transformers' own model, and over HTTP."""

import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bs_coordinator.config import SamplingConfig
from bs_coordinator.engine.logprobs import TokenLogprob, log_probabilities
from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.engine.scheduler import Progress, Scheduler
from bs_coordinator.engine.sequence import Sequence, TokenEvent
from bs_coordinator.engine.speculation import Speculation
from bs_coordinator.engine.tokenizer import Tokenizer
from bs_coordinator.http.access import ApiKey
from bs_coordinator.http.answer_server import AnswerServer
from bs_coordinator.http.openai_api import http_app
from bs_coordinator.http.requests import Request
from bs_coordinator.selection import TopK
from bs_coordinator.trunk.load import load_trunk
from testbed.demo_assets import export_demo_bundle
from testbed.evaluation.local_experts import LocalExperts
from tests.checkpoints import VOCABULARY, save_mixtral
from tests.http_site import HttpSite
from tests.waiting import wait_until

IDS = [(7 * i + i // 5) % (VOCABULARY - 3) + 3 for i in range(300)]
"""More than two chunks of a prompt whose tokens are scored."""


class _Exact(NamedTuple):
    model: DistributedModel
    tokenizer: Tokenizer
    reference: Any

    def log_softmax(self, ids: list[int]) -> Tensor:
        """Of transformers' own model: float32 [tokens, vocabulary]."""
        with torch.inference_mode():
            return torch.log_softmax(self.reference(torch.tensor([ids])).logits[0].float(), dim=-1)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> _Exact:
    folder = tmp_path_factory.mktemp("exact")
    reference = save_mixtral(folder / "model", "float32", positions=512)
    export_demo_bundle(folder / "model", folder / "bundle", "fp32")
    trunk = folder / "bundle/trunk"
    model = DistributedModel(load_trunk(trunk), LocalExperts(folder / "bundle", threads=1), TopK(2))
    tokenizer = Tokenizer(trunk)
    tokenizer.eos_ids = frozenset()  # answers are as long as the tests ask for
    return _Exact(model, tokenizer, reference)


def _check(found: list[TokenLogprob], expected: Tensor, ids: list[int], top: int) -> None:
    """Whether each token's log-probabilities are those of the row before it."""
    assert [score.id for score in found] == ids
    for score, row in zip(found, expected, strict=True):
        assert score.logprob == pytest.approx(float(row[score.id]), abs=1e-4)
        values, _ = row.topk(top)
        assert [value for _, value in score.top] == pytest.approx(values.tolist(), abs=1e-4)
        assert [float(row[id]) for id, _ in score.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_log_probabilities_are_those_of_transformers(exact: _Exact) -> None:
    config = SamplingConfig(max_tokens=6, logprobs=4, prompt_logprobs=True)
    events = list(Sequence(exact.model, exact.tokenizer).generate(IDS, config))
    answer = [event.id for event in events]
    expected = exact.log_softmax(IDS + answer)
    first, *others = events
    _check(list(first.prompt), expected[: len(IDS) - 1], IDS[1:], 4)
    scores = [event.logprob for event in events if event.logprob is not None]
    _check(scores, expected[len(IDS) - 1 : -1], answer, 4)
    assert not any(event.prompt for event in others)
    # The prompt's chunks are steps of a prompt, also where the logits of all their tokens are wanted.
    assert [step.phase for step in first.steps] == ["prefill"] * 3
    assert [step.tokens for step in first.steps] == [128, 128, 44]


def test_sampling_and_drafts_change_no_log_probability(exact: _Exact) -> None:
    """They are those of the model, whatever was drawn, in however few steps, together with whatever else."""
    config = SamplingConfig(max_tokens=16, temperature=1.5, top_p=0.9, seed=3, logprobs=2)
    prompt = IDS[:12] * 2
    plain = list(Sequence(exact.model, exact.tokenizer).generate(prompt, config))
    _check([e.logprob for e in plain if e.logprob], exact.log_softmax(prompt + [e.id for e in plain])[23:-1],
           [e.id for e in plain], 2)  # fmt: skip
    scheduler = Scheduler(exact.model)
    drafting = Sequence(exact.model, exact.tokenizer, speculation=Speculation("ngram"))
    answers = [drafting.answer(prompt, config), Sequence(exact.model, exact.tokenizer).answer(prompt[:5], config)]
    together: list[TokenEvent] = []
    for answer in answers:
        scheduler.add(answer)
    while not scheduler.idle:
        together += [e for progress in scheduler.step() if progress.answer is answers[0] for e in progress.events]
    assert [e.id for e in together] == [e.id for e in plain]
    for one, other in zip(together, plain, strict=True):
        assert one.logprob is not None
        assert other.logprob is not None
        assert one.logprob.logprob == pytest.approx(other.logprob.logprob, abs=1e-4)


def test_a_prompt_is_scored_again_although_it_is_cached(exact: _Exact) -> None:
    sequence = Sequence(exact.model, exact.tokenizer)
    config = SamplingConfig(max_tokens=2, logprobs=0, prompt_logprobs=True)
    first, second = (next(iter(sequence.generate(IDS[:20], config))).prompt for _ in range(2))
    assert len(first) == 19
    assert [score.logprob for score in second] == pytest.approx([score.logprob for score in first], abs=1e-5)


def test_extreme_logits_have_finite_log_probabilities() -> None:
    logits = torch.tensor([[3e4, -3e4, 0.0], [1.0, 1.0, 1.0]]).repeat(40, 1)
    scores = log_probabilities(logits, [1, 2] * 40, 9)
    assert len(scores) == 80
    assert scores[0] == TokenLogprob(1, -6e4, ((0, 0.0), (2, -3e4), (1, -6e4)))
    assert scores[79].logprob == pytest.approx(-math.log(3))


def test_end_tokens_can_be_held_off_or_ignored(exact: _Exact, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(**more: Any) -> list[TokenEvent]:
        config = SamplingConfig(max_tokens=8, **more)
        return list(Sequence(exact.model, exact.tokenizer).generate(IDS[:10], config))

    plain = [event.id for event in answer()]
    monkeypatch.setattr(exact.tokenizer, "eos_ids", frozenset({plain[3]}))
    end = plain.index(plain[3])
    assert [e.id for e in answer()] == plain[: end + 1]
    ignored = answer(ignore_eos=True)
    assert ([e.id for e in ignored], ignored[-1].stop) == (plain, "max-tokens")
    held = [e.id for e in answer(min_tokens=end + 3)]
    assert held[:end] == plain[:end]
    assert len(held) > end + 2
    assert plain[3] not in held[: end + 2]


class _Gated(Scheduler):
    """Makes no step while the gate is closed."""

    def __init__(self, model: DistributedModel) -> None:
        super().__init__(model, max_live=2)
        self.gate = threading.Event()
        self.gate.set()

    def step(self) -> list[Progress]:
        return super().step() if self.gate.wait(0.02) else []


class _Idle:
    """No nodes, none of them missing."""

    def pump(self, seconds: float) -> None:
        return

    def describe_lost(self) -> str:
        return ""

    def no_reconnecting(self) -> AbstractContextManager[None]:
        return nullcontext()


class _Counting(AnswerServer):
    """Knows the largest number of requests that it had at once."""

    most = 0

    def accept(self, *args: Any, **more: Any) -> Request:
        request = super().accept(*args, **more)
        self.most = max(self.most, self.load().requests)
        return request


class _Site(HttpSite):
    """The whole HTTP interface, with two answers at a time."""

    def __init__(self, exact: _Exact) -> None:
        dispatcher: Any = _Idle()
        self.scheduler = _Gated(exact.model)
        self.lines: list[dict[str, Any]] = []
        self.server = _Counting(
            self.scheduler, lambda: Sequence(exact.model, exact.tokenizer), max_waiting=1, dispatcher=dispatcher
        )
        self.server.start()
        keys = [ApiKey("ada", "a-key"), ApiKey("bob", "b-key", most_requests=1)]
        app = http_app(
            self.server, exact.tokenizer, model="exact", stall_s=60, keys=keys, model_aliases=["other"],
            about={"policy": "topk", "draft": "none"}, log_request=self.lines.append, keep_alive_s=0.01,
        )  # fmt: skip
        super().__init__(app, "a-key")

    def close(self) -> None:
        self.server.stop()
        super().close()

    def complete(self, prompt: object, **more: object) -> Any:
        status, _, body = self.ask("POST", "/v1/completions", {"prompt": prompt, "max_tokens": 4, **more})
        assert status == 200, body
        return body

    def chunks(self, prompt: object, **more: object) -> list[Any]:
        body = {"prompt": prompt, "max_tokens": 4, "stream": True, **more}
        _, _, text = self.text("POST", "/v1/completions", body)
        events = [event for event in text.split("\n\n") if event and not event.startswith(":")]
        assert events.pop() == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.fixture(scope="module")
def site(exact: _Exact) -> Iterator[_Site]:
    site = _Site(exact)
    yield site
    site.close()


def test_a_list_of_prompts_is_scored_as_evaluation_harnesses_ask(site: _Site, exact: _Exact) -> None:
    """As lm-evaluation-harness sends them: token ids, echoed with the likeliest token beside each, and one more."""
    prompts = [IDS[:9], IDS[40:45], IDS[9:30], IDS[60:62], IDS[3:4]]
    body = site.complete(prompts, max_tokens=1, logprobs=1, echo=True, seed=1234, temperature=0)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3, 4]
    for choice, ids in zip(body["choices"], prompts, strict=True):
        found = choice["logprobs"]
        expected = exact.log_softmax(ids)
        assert len(found["tokens"]) == len(ids) + 1
        assert found["tokens"][:-1] == [f" w{id}" for id in ids]
        assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
        own = [float(row[id]) for row, id in zip(expected, ids[1:], strict=False)]
        assert found["token_logprobs"][1:-1] == pytest.approx(own, abs=1e-4)
        best = [float(row.max()) for row in expected]
        assert [max(top.values()) for top in found["top_logprobs"][1:]] == pytest.approx(best, abs=1e-4)
        assert found["text_offset"][1] == len(found["tokens"][0])
    assert body["usage"] == {"prompt_tokens": 38, "completion_tokens": 5, "total_tokens": 43}


def test_a_prompt_can_be_scored_without_new_tokens(site: _Site) -> None:
    for stream in (False, True):
        ask: Callable[..., Any] = site.chunks if stream else site.complete
        found = ask([5, 6, 7], max_tokens=0, echo=True, logprobs=0)
        (choice,) = (found[0] if stream else found)["choices"]
        assert choice["text"] == "w5 w6 w7"
        assert choice["finish_reason"] == "length"
        assert len(choice["logprobs"]["token_logprobs"]) == 3
    assert found[0]["choices"] == site.complete([5, 6, 7], max_tokens=0, echo=True, logprobs=0)["choices"]


def test_choices_differ_by_their_seeds(site: _Site) -> None:
    asked = {"temperature": 1.2, "n": 5, "seed": 11}
    texts = [choice["text"] for choice in site.complete([[5, 6], [9]], **asked)["choices"]]
    assert len(set(texts)) > 5
    alone = [site.complete("w9", temperature=1.2, seed=11 + i)["choices"][0]["text"] for i in range(5)]
    assert texts[5:] == alone
    greedy = site.complete("w9", n=2)["choices"]
    assert greedy[0]["text"] == greedy[1]["text"]


@pytest.mark.parametrize("scored", [{}, {"echo": True, "logprobs": 1}])
def test_choices_of_a_prompt_compute_it_once(
    site: _Site, exact: _Exact, monkeypatch: pytest.MonkeyPatch, scored: dict[str, Any]
) -> None:
    computed: list[int] = []
    step = exact.model.step

    def counted(inputs: Any, **more: Any) -> Any:
        computed.extend(len(each.ids) for each in inputs)
        return step(inputs, **more)

    monkeypatch.setattr(exact.model, "step", counted)
    prompts = [IDS[:150], IDS[150:]]
    asked = {"temperature": 1.2, "seed": 11, "max_tokens": 3, **scored}
    choices = site.complete(prompts, n=4, **asked)["choices"]
    # Of each of eight choices, its two tokens but the last; of six, the prompt's last token; the prompts themselves.
    assert sum(computed) == 8 * 2 + 6 + 300
    for i, choice in enumerate(choices):
        alone = site.complete(prompts[i // 4], **{**asked, "seed": 11 + i % 4})["choices"][0]
        assert choice["text"] == alone["text"]
        for name, values in (alone["logprobs"] or {} if scored else {}).items():
            assert [_close(value) for value in values] == choice["logprobs"][name], name
    assert len({choice["text"] for choice in choices}) >= 4


def test_a_prompt_that_can_not_be_cut_is_computed_by_each_choice(
    site: _Site, exact: _Exact, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"temperature": 1.2, "seed": 11, "n": 3}
    expected = site.complete(IDS[:40], **asked)["choices"]
    monkeypatch.setattr(type(exact.model.trunk), "can_truncate", False)
    assert site.complete(IDS[:40], **asked)["choices"] == expected


def _close(value: Any) -> Any:
    """Equal to a value up to rounding."""
    return pytest.approx(value, abs=1e-4) if isinstance(value, float | dict) else value


def test_a_stream_says_which_choice_each_chunk_belongs_to(site: _Site) -> None:
    asked = {"n": 3, "temperature": 1.2, "seed": 4, "echo": True, "logprobs": 2}
    whole = site.complete([[5, 6], [9]], **asked)["choices"]
    chunks = site.chunks([[5, 6], [9]], stream_options={"continuous_usage_stats": True}, **asked)
    for expected in whole:
        parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == expected["index"]]
        assert "".join(part["text"] for part in parts) == expected["text"]
        assert parts[-1]["finish_reason"] == expected["finish_reason"]
        for name, values in expected["logprobs"].items():
            found = [value for part in parts for value in part["logprobs"][name]]
            assert [_close(value) for value in values] == found, name
    assert chunks[-1]["usage"]["completion_tokens"] == 24


def test_many_prompts_leave_places_to_others(site: _Site) -> None:
    """All are answered although only three requests have a place, and a request of another caller is answered too."""
    prompts = [[i, i + 1] for i in range(3, 23)]
    with site.send("/v1/completions", {"prompt": prompts, "max_tokens": 3, "stream": True}) as many:
        assert many.recv(12) == b"HTTP/1.1 200"
        assert len(site.complete("w5")["choices"]) == 1
    wait_until(lambda: site.server.load().requests == 0, "the answers of a caller that has hung up to end")
    site.server.most = 0
    assert [len(choice["text"].split()) for choice in site.complete(prompts, max_tokens=3)["choices"]] == [3] * 20
    assert site.server.most == 2  # also when two answers end in one step


def test_a_stream_stays_alive_while_its_caller_waits(site: _Site) -> None:
    site.scheduler.gate.clear()
    asked = {"prompt": [5, 6], "max_tokens": 2, "stream": True}
    with site.send("/v1/completions", asked), site.send("/v1/completions", asked):
        wait_until(lambda: site.server.load().requests == 2, "two requests")
        connection, response = site.open("POST", "/v1/completions", asked)
        assert response.readline() == b": waiting, 1 requests ahead\n"
        site.scheduler.gate.set()
        assert response.read().endswith(b"data: [DONE]\n\n")
        connection.close()
    wait_until(lambda: site.server.load().requests == 0, "all answers to end")


def test_the_model_is_asked_for_by_its_names(site: _Site) -> None:
    for name in ("exact", "other", "wdmoe", ""):
        assert site.complete("w5", model=name)["model"] == "exact"
    status, _, body = site.ask("POST", "/v1/completions", {"prompt": "w5", "model": "gpt-4"})
    assert (status, "use 'exact'" in body["error"]["message"]) == (404, True)


def test_an_answer_says_how_it_was_made(site: _Site) -> None:
    extra = site.complete([5, 6], max_tokens=5)["wdmoe"]
    assert (extra["policy"], extra["draft"], extra["degraded_tokens"]) == ("topk", "none", 0)
    assert extra["ttft_ms"] > 0
    assert extra["tpot_ms"] > 0
    assert 0 < extra["layer_wait_share"] < 1


def test_keys_have_names_and_limits_and_requests_are_logged_under_them(site: _Site) -> None:
    bob = HttpSite.__new__(HttpSite)
    bob.port, bob.key = site.port, "b-key"
    site.scheduler.gate.clear()
    waiting = bob.send("/v1/completions", {"prompt": [5, 6], "max_tokens": 2})
    wait_until(lambda: site.server.load().requests == 1, "bob's first request")
    status, headers, body = bob.ask("POST", "/v1/completions", {"prompt": "w5"})
    assert (status, headers["retry-after"]) == (429, "1")
    assert "'bob' has 1 requests already" in body["error"]["message"]
    site.scheduler.gate.set()
    assert waiting.recv(12) == b"HTTP/1.1 200"
    waiting.close()
    wait_until(lambda: sum(line["key"] == "bob" for line in site.lines) == 2, "the lines of bob's requests")
    refused, answered = (line for line in site.lines if line["key"] == "bob")
    assert (refused["status"], answered["status"]) == (429, 200)
    assert (answered["prompt_tokens"], answered["completion_tokens"], answered["choices"]) == (2, 2, 1)
    assert 0 < answered["ttft_ms"] <= answered["e2e_ms"]
    bob.key = "guess"
    assert bob.ask("POST", "/v1/completions", {"prompt": "w5"})[0] == 401
    wait_until(lambda: site.lines[-1]["status"] == 401, "the line of a refused caller")
    assert site.lines[-1]["key"] == ""
    assert "w5" not in json.dumps(site.lines)


def test_a_caller_that_hangs_up_is_logged(site: _Site) -> None:
    site.scheduler.gate.clear()
    with site.send("/v1/completions", {"prompt": "w5", "stream": True}) as caller:
        assert caller.recv(12) == b"HTTP/1.1 200"
    wait_until(lambda: site.lines[-1]["status"] == 499, "the line of a caller that has hung up")
    site.scheduler.gate.set()
