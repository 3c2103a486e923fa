"""The live page: its feed before a real base station, its files, and how steps and nodes are shown."""

import asyncio
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from bs_coordinator.base_station import open_base_station
from bs_coordinator.config import BaseStationConfig
from bs_coordinator.engine.scheduler import Progress, Scheduler
from bs_coordinator.engine.sequence import TokenEvent
from bs_coordinator.engine.step_records import DispatchRecord, LayerRecord, StepRecord
from bs_coordinator.http.access import ApiKey
from bs_coordinator.http.answer_server import AnswerServer
from bs_coordinator.http.live_view import LiveView, model_facts
from bs_coordinator.http.openai_api import http_app
from bs_coordinator.page.documents import Alarm, LinkView, ModelFacts, NodeView, Snapshot, Totals
from bs_coordinator.page.feed import LiveFeed
from bs_coordinator.page.fleet_view import SeenNodes, alarms, placement
from bs_coordinator.page.step_log import KEPT_STEPS, StepLog
from tests.http_site import HttpSite
from tests.node_threads import node_thread
from wire.frames import NodeDurations
from wire.status import NodeStatus
from wire.transports.memory import MemoryBroker

NONE: Any = None
STATIC = files("bs_coordinator.page").joinpath("static")
MODEL = ModelFacts(
    name="m", layers=1, experts=2, top_k=1, quantisation="int4", policies=["topk", "top1"], drafts="none", chat=True
)  # fmt: skip
TOTALS = Totals(running=0, ended=0, failed=0, refused=0, tokens=0, drafted=0, accepted=0, degraded=0)


def _snapshot(moment: int, model: ModelFacts | None = MODEL) -> Snapshot:
    return Snapshot(unix_ms=moment, nodes=[], alarms=[], totals=TOTALS, cpu_load=0.0, model=model)


def _snapshots(response: Any) -> Iterator[Any]:
    """The snapshots of a feed as they come."""
    for line in response:
        if line.startswith(b"data: "):
            yield json.loads(line[6:])


def test_a_viewer_sees_the_fleet_then_an_answer_then_a_node_that_leaves(random_bundle: Path) -> None:
    with MemoryBroker() as broker, ExitStack() as stack, ExitStack() as second_node:
        stack.enter_context(node_thread(random_bundle, broker.address, "a", "L*:E0-1"))
        second_node.enter_context(node_thread(random_bundle, broker.address, "b", "L*:E2-3"))
        config = BaseStationConfig(bundle=random_bundle, draft="none")
        station = stack.enter_context(open_base_station(config, broker.address))
        live = LiveFeed()
        view = LiveView(
            station.dispatcher, live, model_facts(station, ["topk", "top1"]), most_running=9, cpu_load=lambda: 0.0
        )
        server = AnswerServer(
            Scheduler(station.model), station.new_sequence, max_waiting=1, dispatcher=station.dispatcher,
            observers=[view],
        )  # fmt: skip
        server.start()
        stack.callback(server.stop)
        site = HttpSite(http_app(server, station.tokenizer, model="m", stall_s=9, live=live))
        stack.callback(site.close)
        connection, response = site.open("GET", "/live/events")
        stack.callback(connection.close)
        assert response.headers["Content-Type"].startswith("text/event-stream")
        snapshots = _snapshots(response)

        first = next(snapshots)
        assert (first["model"]["layers"], first["model"]["experts"], first["model"]["policies"]) == (
            2,
            4,
            ["topk", "top1"],
        )
        assert first["placement"] == {"names": ["a", "b"], "asked": [[0, 0, 1, 1]] * 2}
        assert [(node["name"], node["state"], node["held"]) for node in first["nodes"]] == [
            ("a", "online", 4), ("b", "online", 4),
        ]  # fmt: skip
        assert all(node["link"]["rtt_ms"] > 0 for node in first["nodes"])
        assert first["alarms"] == []

        assert site.ask("POST", "/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 8})[0] == 200
        steps: list[Any] = []
        active: list[Any] = []
        now = first
        while now["totals"]["ended"] == 0 or not steps:
            now = next(snapshots)
            steps += now.get("steps", [])
            active += now.get("active", [])
        assert "model" not in now
        assert "placement" not in now
        assert sum(step.get("tokens", 1) for step in steps) == now["totals"]["tokens"] == 8
        assert [bool(step.get("prefill")) for step in steps] == [True] + 7 * [False]
        # Three rows of the prompt and seven tokens, each with two experts in both layers.
        assert sum(tokens for _, _, tokens in active) == (3 + 7) * 2 * 2
        assert all(node["measured_ms"] > 0 for node in now["nodes"])

        second_node.close()
        while now["nodes"][1]["state"] == "online":
            now = next(snapshots)
        assert now["nodes"][1]["state"] == "lost"
        assert now["placement"] == {"names": ["a"], "asked": [[0, 0, -1, -1]] * 2}
        assert (now["alarms"][0]["kind"], now["alarms"][0]["severe"]) == ("experts", True)
        assert "Node b lost: it went offline" in [alarm["text"] for alarm in now["alarms"]]


def _client(feed: LiveFeed, key: str | None = None) -> TestClient:
    keys = [ApiKey("default", key)] if key else []
    return TestClient(http_app(NONE, NONE, model="m", keys=keys, stall_s=1, live=feed))


def test_the_page_is_open_and_its_feed_needs_the_key() -> None:
    feed = LiveFeed(max_viewers=0)
    client = _client(feed, "k")
    assert client.get("/").status_code == 200
    refused = client.get("/live/events")
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
    with_key = {"Authorization": "Bearer k"}
    full = client.get("/live/events", headers=with_key)
    assert (full.status_code, "close one" in full.json()["error"]["message"]) == (503, True)
    assert int(full.headers["retry-after"]) > 0
    assert client.head("/live/events", headers=with_key).status_code == 200
    assert _client(feed).head("/live/events").status_code == 200


def test_without_a_feed_there_is_no_page() -> None:
    client = TestClient(http_app(NONE, NONE, model="m", stall_s=1))
    assert client.get("/").status_code == client.get("/live/events").status_code == 404


@pytest.mark.parametrize("path", ["/", *(f"/live/{file.name}" for file in STATIC.iterdir())])
def test_files_run_nothing_but_themselves(path: str) -> None:
    response = _client(LiveFeed()).get(path)
    assert response.status_code == 200
    policy = response.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    kind = response.headers["content-type"].partition(";")[0]
    assert kind == {"": "text/html", "html": "text/html", "css": "text/css", "js": "text/javascript",
                    "svg": "image/svg+xml"}[path.rpartition(".")[2] if "." in path else ""]  # fmt: skip
    # Names come from nodes: no way by which a text becomes markup or code, and no style attributes, which the policy
    # forbids.
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|\sstyle=|\son\w+=", response.text
    )
    for target in re.findall(r'(?:href|src|from)[= ]"(/live/[^"]+)"', response.text):
        assert STATIC.joinpath(target.removeprefix("/live/")).is_file()


@pytest.mark.parametrize("name", ["nothing.js", "..%2Froutes.py", "__init__.py", "%2e%2e"])
def test_other_files_are_not_served(name: str) -> None:
    assert _client(LiveFeed()).get(f"/live/{name}").status_code == 404


def test_a_viewer_that_does_not_read_is_dropped_and_the_others_stay() -> None:
    async def run() -> tuple[list[bytes], list[bytes]]:
        feed = LiveFeed(max_viewers=2, waiting=3)
        slow, quick = feed.join(), feed.join()
        assert slow is not None
        assert quick is not None
        assert feed.join() is None
        assert (feed.take_newcomers(), feed.take_newcomers()) == (True, False)
        reading = feed.events(quick)
        got = [await anext(reading)]
        for moment in range(5):
            feed.publish(_snapshot(moment))
            got.append(await anext(reading))
        assert feed.viewers == 1
        missed = [event async for event in feed.events(slow)]
        assert feed.join() is not None
        feed.close()
        assert feed.join() is None
        return got + [event async for event in reading], missed

    got, missed = asyncio.run(run())
    assert [json.loads(event[6:])["unix_ms"] for event in got if event.startswith(b"data: ")] == [0, 1, 2, 3, 4]
    assert not any(event.startswith(b"data: ") for event in missed)


def test_an_idle_feed_sends_heartbeats_and_begins_with_a_whole_snapshot() -> None:
    async def run() -> list[bytes]:
        feed = LiveFeed(heartbeat_s=0.0)
        viewer = feed.join()
        assert viewer is not None
        events = feed.events(viewer)
        beats = [await anext(events) for _ in range(3)]
        feed.publish(_snapshot(1, None))
        feed.publish(_snapshot(2))
        await asyncio.sleep(0)  # lets the loop hand the snapshots on
        assert viewer.events.qsize() == 1
        return beats

    beats = asyncio.run(run())
    # A line that begins with a colon is a comment, which readers of event streams ignore.
    assert all(beat.startswith(b":") and beat.endswith(b"\n\n") for beat in beats)


def _step(total_ms: int, *, phase: Any = "decode", accepted: int = 0) -> StepRecord:
    durations = NodeDurations(queue_ns=1_000_000, compute_ns=4_000_000)
    request = DispatchRecord("a", (1,), 1, 0, 12_000_000, durations, 10, 10, 9_000_000)
    layer = LayerRecord(0, 5_000_000, 12_000_000, (), (request,))
    return StepRecord(phase, 0, 1, total_ms * 1_000_000, 2_000_000, (layer,), drafted=2 * accepted, accepted=accepted)


def _progress(*events: tuple[StepRecord, ...], degraded: tuple[int, ...] = ()) -> Progress:
    made = [TokenEvent(1, "x", steps, None, degraded=number in degraded) for number, steps in enumerate(events)]
    return Progress(NONE, made)


def test_answers_share_the_entry_of_their_step() -> None:
    log = StepLog(1, 2)
    shared = _step(20)
    log.add(_progress((shared,)))
    log.add(_progress((shared,)))
    assert log.close()
    (step,) = log.steps
    assert (step.answers, step.tokens, log.tokens, step.prefill) == (2, 2, 2, False)
    # 20 ms: 5 of the layer's trunk and 2 of embedding and head; 12 of the request, 5 of them on the node.
    parts = (step.trunk_ms, step.head_ms, step.network_ms, step.queue_ms, step.compute_ms, step.packing_ms)
    assert parts == (5, 2, 7, 1, 4, 1)
    measured, predicted = log.nodes["a"].measured_ms, log.nodes["a"].predicted_ms
    assert measured is not None
    assert predicted is not None
    assert (measured.value, predicted.value) == (12, 9)
    assert not log.close()


def test_drafts_and_degraded_tokens_are_counted_and_prompts_shown_once() -> None:
    log = StepLog(1, 2)
    chunk = _step(50, phase="prefill")
    log.add(_progress((_step(21),)))
    log.add(_progress((chunk,)))  # another answer's token, in the step that began this answer's prompt
    log.close()
    log.add(_progress((chunk, _step(30, phase="prefill")), degraded=(0,)))
    log.close()
    log.add(_progress((_step(22, accepted=2),), (), (), degraded=(0, 2)))
    log.close()
    assert [(step.serial, step.prefill, step.tokens, step.accepted) for step in log.steps] == [
        (1, False, 1, 0), (2, True, 1, 0), (3, True, 1, 0), (4, False, 3, 2),
    ]  # fmt: skip
    assert (log.tokens, log.drafted, log.accepted, log.degraded) == (6, 4, 2, 3)
    assert [step.degraded for step in log.steps] == [0, 0, 1, 2]
    assert [step.serial for step in log.since(2)] == [3, 4]
    for _ in range(KEPT_STEPS + 5):
        log.add(_progress((_step(100 + log.last_serial),)))
        log.close()
    assert len(log.steps) == KEPT_STEPS


def test_nodes_that_left_are_remembered_until_they_come_back() -> None:
    seen = SeenNodes()
    status = {name: NodeStatus(schema=1, node=name, boot_id="b", state="online", since_unix_ms=0) for name in "abc"}
    assert seen.update(status, ()) == {}
    assert seen.update({"a": status["a"]}, ["c"]) == {"b": status["b"]}
    assert seen.update({}, ()).keys() == {"a", "b"}
    assert seen.update(status, ()) == {}
    many = {f"n{i}": status["a"] for i in range(200)}
    seen.update(many, ())
    assert len(seen.update({}, ())) == 64


def test_alarms_name_what_is_wrong() -> None:
    link = LinkView(rtt_ms=1, down_mbps=1, up_mbps=1, samples=1, stale=False)
    nodes = [
        NodeView(name="cool", state="online", link=link, celsius=50.0, throttling=""),
        NodeView(name="hot", state="online", celsius=85.0),
        NodeView(name="slow", state="left out", reason="no answer", throttling="under-voltage"),
    ]
    calm = alarms(nodes[:1], "", cpu_load=0.5, running=3, most_running=4)
    assert calm == []
    found = alarms(nodes, "no node holds L0:E0", cpu_load=4.0, running=4, most_running=4)
    assert [(alarm.kind, alarm.severe) for alarm in found] == [
        ("experts", True), ("node", False), ("heat", False), ("heat", False), ("queue", False), ("load", False),
    ]  # fmt: skip
    assert found[1] == Alarm(kind="node", severe=False, text="Node slow is left out: no answer")


def test_a_placement_names_each_node_once() -> None:
    placed = placement([["b", "@bs"], [None, "a"]])
    assert placed.names == ["@bs", "a", "b"]
    assert placed.asked == [[2, 0], [-1, 1]]
    in_slices = placement([["b", "a", "c", "c"], ["a", None, "@bs", "a"]], 2)
    assert in_slices.names == ["@bs, a", "a, b", "c"]
    assert in_slices.asked == [[1, 2], [-1, 0]]
