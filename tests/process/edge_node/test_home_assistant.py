"""A node's process and a real broker, as Home Assistant sees them."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from bs_coordinator.base_station import open_base_station
from bs_coordinator.config import BaseStationConfig, SamplingConfig
from edge_node.home_assistant import discovery_topic
from testbed.local_nodes import LocalNodes
from tests.home_assistant import check_announcement, values
from tests.waiting import wait_until
from wire.broker_address import BrokerAddress
from wire.topics import Topics
from wire.transport import Transport
from wire.transports import connect


class _Home:
    """Keeps the newest message of each topic."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.messages: dict[str, bytes] = {}

    def sees(self, *topics: str) -> bool:
        while message := self._transport.receive(0.1):
            self.messages[message.topic] = message.payload
        return all(topic in self.messages for topic in topics)


@pytest.fixture
def home(broker: BrokerAddress, fleet: LocalNodes) -> Iterator[_Home]:
    topics = Topics(fleet.cluster)
    with closing(connect(broker, f"home-{fleet.cluster}")) as transport:
        for topic in (topics.status("+"), topics.telemetry("+"), f"homeassistant/device/{fleet.cluster}/#"):
            transport.subscribe(topic, qos=1)
        yield _Home(transport)


def test_a_node_appears_works_and_is_lost(fleet: LocalNodes, broker: BrokerAddress, home: _Home) -> None:
    topics = Topics(fleet.cluster)
    status, telemetry = topics.status("n1"), topics.telemetry("n1")
    announced = discovery_topic("homeassistant", fleet.cluster, "n1")
    fleet.start("n1", "L*:E*", options=["--home-assistant"])
    wait_until(lambda: home.sees(announced, status, telemetry), "the announcement")

    def shown() -> dict[str, str]:
        home.sees()
        return values(check_announcement(announced, home.messages[announced]), home.messages)

    wait_until(lambda: "load" in shown(), "the sensors of telemetry")
    found = shown()
    assert (found["takes_work"], found["reason"], found["rows"]) == ("ON", "none", "0")
    assert int(found["memory_available"]) > 0

    config = BaseStationConfig(bundle=fleet.bundle, cluster=fleet.cluster)
    with open_base_station(config, broker) as station:
        events = list(station.new_sequence().generate([1, 2, 3, 4, 5], SamplingConfig(max_tokens=2)))
        layers = [layer for event in events for step in event.steps for layer in step.layers]
        rows = sum(dispatch.tokens for layer in layers for dispatch in layer.dispatches)
        # More if requests were overdue, and for the probes of a base station's start.
        wait_until(lambda: int(shown()["rows"]) >= rows > 0, "the rows in the status")

    # A restarted broker would have lost it: a client that subscribes now still finds it there.
    with closing(connect(broker, f"late-{fleet.cluster}")) as late:
        late.subscribe(announced, qos=1)
        message = late.receive(60.0)
        assert message is not None
        assert message.retained
    fleet.processes["n1"].kill()
    wait_until(lambda: shown()["takes_work"] == "OFF", "the last will")
    found = shown()
    assert (found["rows"], found["reason"]) == ("unavailable", "connection lost")


def test_nothing_is_announced_without_the_option(fleet: LocalNodes, home: _Home) -> None:
    topics = Topics(fleet.cluster)
    fleet.start("n2", "L*:E0")
    # What would be announced comes between the first status and the third message of telemetry.
    wait_until(lambda: home.sees(topics.status("n2"), topics.telemetry("n2")), "the node")
    home.messages.pop(topics.telemetry("n2"))
    wait_until(lambda: home.sees(topics.telemetry("n2")), "more telemetry")
    assert not [topic for topic in home.messages if topic.startswith("homeassistant")]


def test_an_invalid_topic_prefix_is_refused(fleet: LocalNodes, run_process: Any) -> None:
    done = run_process(
        "edge_node", "--bundle", fleet.bundle, "--broker", str(fleet.address), "--id", "n", "--experts", "L*:E0",
        "--home-assistant", "a/#",
    )  # fmt: skip
    assert done.returncode == 2
    assert "--home-assistant: 'a/#' is not a prefix of topics" in done.stderr
