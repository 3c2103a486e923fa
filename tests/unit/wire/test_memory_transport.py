"""The in-process broker has what this project uses of MQTT."""

import threading

import pytest

from common.clock import ManualClock
from wire import transports
from wire.broker_address import BrokerAddress
from wire.broker_url import parse_broker_url
from wire.errors import BrokerError
from wire.transport import LastWill, Message, Transport
from wire.transports.memory import MemoryBroker


def _all(transport: Transport) -> list[tuple[str, bytes, bool]]:
    """What arrives until nothing has for a second."""
    found: list[tuple[str, bytes, bool]] = []
    while message := transport.receive(1.0):
        found.append((message.topic, message.payload, message.retained))
    return found


def test_messages_go_to_those_whose_filters_match_once_and_in_order() -> None:
    with MemoryBroker(clock=ManualClock()) as broker:
        here, there = (transports.connect(broker.address, name) for name in ("here", "there"))
        here.subscribe("nodes/+/status")
        here.subscribe("nodes/#")
        there.subscribe("nodes/a/status")
        for topic in ("nodes/a/status", "nodes/b/status", "nodes/a/b/status", "results/a"):
            there.publish(topic, topic.encode())
        assert [topic for topic, _, _ in _all(here)] == ["nodes/a/status", "nodes/b/status", "nodes/a/b/status"]
        assert _all(there) == [("nodes/a/status", b"nodes/a/status", False)]


def test_retained_messages_wait_for_subscribers_until_an_empty_one_removes_them() -> None:
    with MemoryBroker(clock=ManualClock()) as broker:
        node = transports.connect(broker.address, "node")
        node.publish_confirmed("s", b"old", retain=True)
        node.publish_confirmed("s", b"new", retain=True)
        early = transports.connect(broker.address, "early")
        early.subscribe("s")
        node.publish("s", b"", retain=True)
        late = transports.connect(broker.address, "late")
        late.subscribe("s")
        assert _all(early) == [("s", b"new", True), ("s", b"", False)]
        assert _all(late) == []


def test_a_will_is_published_when_a_connection_breaks_and_not_when_it_is_closed() -> None:
    with MemoryBroker(clock=ManualClock()) as broker:
        watch = transports.connect(broker.address, "watch")
        watch.subscribe("+")
        lost, left, replaced = (
            transports.connect(broker.address, name, will=LastWill(name, b"gone")) for name in ("lost", "left", "again")
        )
        left.close()
        left.close()
        broker.cut("lost")
        transports.connect(broker.address, "again")
        assert _all(watch) == [("lost", b"gone", False), ("again", b"gone", False)]
        for dead in (lost, left, replaced):
            with pytest.raises(BrokerError, match="lost the connection"):
                dead.publish("x", b"")


def test_waiting_advances_a_manual_clock_to_the_arrival_or_the_deadline() -> None:
    clock = ManualClock()
    with MemoryBroker(clock=clock, latency_s=0.25) as broker:
        client = transports.connect(broker.address, "c")
        client.subscribe("#")
        broker.publish("late", b"", delay_s=2.0)
        broker.publish("t", b"")
        assert client.receive(1.0) == Message("t", b"", 250_000_000)
        assert client.receive(1.0) is None
        assert clock.monotonic_s() == 1.25
        assert client.receive(1.0) == Message("late", b"", 2_000_000_000)


def test_clients_in_several_threads_wake_each_other() -> None:
    with MemoryBroker() as broker:
        asking, answering = (transports.connect(broker.address, name) for name in ("asking", "answering"))
        asking.subscribe("answer")
        answering.subscribe("question")

        def answer() -> None:
            message = answering.receive(60.0)
            assert message is not None
            answering.publish("answer", message.payload)

        thread = threading.Thread(target=answer)
        thread.start()
        asking.publish("question", b"?")
        message = asking.receive(60.0)
        thread.join(60.0)
        assert message is not None
        assert message.payload == b"?"


def test_handlers_stand_in_for_clients_and_their_errors_reach_the_publisher() -> None:
    with MemoryBroker(clock=ManualClock()) as broker:
        client = transports.connect(broker.address, "c")
        client.subscribe("results/+")
        broker.handle("work/+", lambda topic, payload: broker.publish(topic.replace("work", "results"), payload))

        def refuse(topic: str, payload: bytes) -> None:
            raise BrokerError("refused")

        broker.handle("work/b", refuse)
        client.publish("work/a", b"1")
        with pytest.raises(BrokerError, match="refused"):
            client.publish("work/b", b"2")
        assert [topic for topic, _, _ in _all(client)] == ["results/a", "results/b"]


def test_a_closed_broker_can_not_be_reached() -> None:
    with MemoryBroker() as broker:
        client = transports.connect(broker.address, "c")
    with pytest.raises(BrokerError, match="lost the connection"):
        client.receive(0.0)
    with pytest.raises(BrokerError, match="no broker at memory://"):
        transports.connect(broker.address, "c")


def test_the_scheme_of_a_url_selects_the_transport() -> None:
    with MemoryBroker() as broker:
        address = parse_broker_url(str(broker.address))
        assert address == broker.address
        assert (address.tls, address.on_loopback, address.in_process) == (False, True, True)
    assert {"mqtt", "mqtts", "memory"} <= set(transports.schemes())
    assert BrokerAddress("localhost", 1).on_loopback
