"""Requests that name a policy of their own, over HTTP before real nodes, as the live page's comparison sends them."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bs_coordinator.base_station import open_base_station
from bs_coordinator.config import BaseStationConfig
from bs_coordinator.engine.scheduler import Progress, Scheduler
from bs_coordinator.engine.step_records import StepRecord
from bs_coordinator.http.answer_server import AnswerServer
from bs_coordinator.http.observers import AnswerObserver
from bs_coordinator.http.openai_api import http_app
from bs_coordinator.http.openai_schema import Chat
from bs_coordinator.http.request_json import parse_request
from bs_coordinator.http.request_policy import NamedPolicy, RequestPolicies
from bs_coordinator.http.requests import Request
from bs_coordinator.selection import TopK
from tests.http_site import HttpSite
from tests.node_threads import node_thread
from wire.transports.memory import MemoryBroker

PARTS = {"trunk_ms", "network_ms", "queue_ms", "compute_ms", "packing_ms", "head_ms", "draft_ms"}
PROMPT = {"prompt": [1, 2, 3], "max_tokens": 6}


class _Steps(AnswerObserver):
    """Keeps the record of each step."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def progressed(self, request: Request, progress: Progress) -> None:
        if progress.step is not None and progress.step not in self.records:
            self.records.append(progress.step)

    def take_pairs(self) -> set[int]:
        """(token, expert) pairs per token in each layer of the steps since the last call."""
        taken = {layer.pairs // step.tokens for step in self.records for layer in step.layers}
        self.records = []
        return taken


class _Site(NamedTuple):
    http: HttpSite
    steps: _Steps


@pytest.fixture(scope="module")
def site(random_bundle: Path) -> Iterator[_Site]:
    """A server that drafts, with two nodes and the policy `topk`."""
    with MemoryBroker() as broker, ExitStack() as stack:
        for name, experts in (("a", "L*:E0-1"), ("b", "L*:E2-3")):
            stack.enter_context(node_thread(random_bundle, broker.address, name, experts))
        config = BaseStationConfig(bundle=random_bundle, draft="ngram")
        station = stack.enter_context(open_base_station(config, broker.address))
        steps = _Steps()
        server = AnswerServer(
            Scheduler(station.model), station.new_sequence, max_waiting=1, dispatcher=station.dispatcher,
            observers=[steps],
        )  # fmt: skip
        server.start()
        stack.callback(server.stop)
        policies = RequestPolicies(NamedPolicy("topk", station.model.policy), top_k=2, scored=True)
        about = {"policy": "topk", "draft": "ngram"}
        site = HttpSite(http_app(server, station.tokenizer, model="m", stall_s=9, policies=policies, about=about))
        stack.callback(site.close)
        yield _Site(site, steps)


def test_a_request_has_its_experts_chosen_by_the_policy_that_it_names(site: _Site) -> None:
    for policy, draft, pairs in ((None, "ngram", 2), ("top1", "none", 1), ("topk:k=3", "none", 3), ("topk", "none", 2)):
        own = {} if policy is None else {"wdmoe": {"policy": policy}}
        site.steps.take_pairs()
        status, _, answer = site.http.ask("POST", "/v1/completions", {**PROMPT, **own})
        assert status == 200
        assert (answer["wdmoe"]["policy"], answer["wdmoe"]["draft"]) == (policy or "topk", draft)
        assert site.steps.take_pairs() == {pairs}


def test_chunks_have_the_parts_of_their_times_if_asked(site: _Site) -> None:
    site.steps.take_pairs()
    body = {**PROMPT, "stream": True, "stream_options": {"include_usage": True}}
    _, _, text = site.http.text("POST", "/v1/completions", {**body, "wdmoe": {"policy": "top1", "timings": True}})
    records, chunks = site.steps.records, [json.loads(line[6:]) for line in text.split("\n\n")[:-2]]
    *tokens, usage = chunks
    assert usage["wdmoe"]["policy"] == "top1"
    assert usage["wdmoe"]["tpot_ms"] > 0
    assert len(tokens) == len(records) == 6
    for chunk, record in zip(tokens, records, strict=True):
        timings = dict(chunk["wdmoe"])
        assert isinstance(timings.pop("token"), int)
        assert timings.keys() == PARTS
        assert sum(timings.values()) == pytest.approx(record.total_ns / 1e6, abs=0.01)
    _, _, text = site.http.text("POST", "/v1/completions", {**body, "wdmoe": {"policy": "top1"}})
    assert "trunk_ms" not in text


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        ({"policy": "fastest"}, "policy 'fastest' is unknown"),
        ({"policy": "topk:k=0"}, "topk:k=0"),
        ({"policy": "topk:keep=/etc/passwd"}, "a table is a file, which only --policy may name"),
        ({"policy": "similar:table=/etc/passwd"}, "a table is a file"),
        ({"policy": 5}, "Expected `str"),
        ({"policies": "topk"}, "unknown field `policies`"),
    ],
)
def test_other_policies_are_refused_by_name(site: _Site, own: dict[str, Any], reason: str) -> None:
    status, _, answer = site.http.ask("POST", "/v1/completions", {**PROMPT, "wdmoe": own})
    assert status == 400
    assert reason in answer["error"]["message"]
    assert "wdmoe" in answer["error"]["message"]


def test_policies_are_offered_that_need_no_files_and_what_the_model_knows() -> None:
    served = NamedPolicy("topk:k=1", TopK(1))
    offered = RequestPolicies(served, top_k=2, scored=True).offered
    assert offered[0] == "topk:k=1"
    assert {"topk", "top1", "wdmoe"} < {*offered}
    assert "similar" not in offered
    unscored = RequestPolicies(served, top_k=2, scored=False)
    assert unscored.offered == ["topk:k=1", "topk", "top1"]
    assert unscored.find("topk") is unscored.find("topk")
    assert unscored.find("topk:k=1") is served
    with pytest.raises(ValueError, match="compares all experts by score"):
        unscored.find("wdmoe")


def test_the_request_of_the_page_is_understood() -> None:
    static = files("bs_coordinator.page").joinpath("static")
    script = static.joinpath("compare.js").read_text() + static.joinpath("api.js").read_text()
    sent = {
        "stream": True, "stream_options": {"include_usage": True}, "messages": [{"role": "user", "content": "Why?"}],
        "max_tokens": 64, "wdmoe": {"policy": "top1", "timings": True},
    }  # fmt: skip
    for written in (
        "stream: true, stream_options: { include_usage: true }", "messages: [{ role:", "max_tokens:",
        "wdmoe: { policy: side.policy, timings: true }",
    ):  # fmt: skip
        assert written in script
    options = parse_request(json.dumps(sent).encode(), Chat)
    assert (options.wdmoe.policy, options.wdmoe.timings, options.stream) == ("top1", True, True)
    assert all(f'id="{name}"' in static.joinpath("index.html").read_text() for name in _ids(script))


def _ids(script: str) -> set[str]:
    """Ids that a script looks up, those of both sides spelt out."""
    found = {part.split('"')[0] for part in script.split('$("')[1:]}
    made = {part.split("-$")[0] for part in script.split("$(`")[1:]}
    return found | {f"{name}-{letter}" for name in made for letter in "ab"}
