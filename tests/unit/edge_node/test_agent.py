"""A node on a broker in memory, by a clock that waiting advances: ids, limits, wills, lost connections."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.clock import ManualClock
from edge_node.agent import NodeAgent
from edge_node.errors import DuplicateNodeError
from edge_node.experts import ExpertRuntime
from edge_node.limits import DeviceLimits
from edge_node.node_status import StatusSource
from edge_node.worker import Worker
from wire import status
from wire.broker_address import BrokerAddress
from wire.errors import BrokerAuthError, BrokerError
from wire.experts import ExpertId
from wire.manifest import Scheme, load_manifest
from wire.status import Holding, NodeStatus
from wire.topics import Topics
from wire.transport import LastWill, Transport
from wire.transports import connect
from wire.transports.memory import MemoryBroker

TOPICS = Topics("t")
STATUS = TOPICS.status("n")


@pytest.fixture(scope="module")
def runtime(tiny_bundle: Callable[[Scheme], Path]) -> ExpertRuntime:
    bundle = tiny_bundle("int8")
    return ExpertRuntime(bundle, load_manifest(bundle), [ExpertId(0, 0)])


class Site:
    """A broker, a node that has not started, and all statuses that clients published."""

    def __init__(self, broker: MemoryBroker, clock: ManualClock, runtime: ExpertRuntime) -> None:
        self.broker, self.clock = broker, clock
        self.stop = threading.Event()
        self.seen: list[NodeStatus] = []
        self.celsius = 40.0
        self.connections: list[str] = []
        self.refusals = 0
        dims = runtime.manifest.dims
        self.holding = Holding(experts="L0:E0", model_sha256="m", dims=dims, quantisation="int8", resident_bytes=0)
        worker = Worker(runtime, clock=clock)
        self.agent = NodeAgent(
            about=StatusSource("n", worker, self.holding, threads=1, clock=clock),
            topics=TOPICS, address=broker.address, worker=worker, clock=clock, connect=self._connect,
            limits=DeviceLimits(
                max_celsius=80, read_celsius=lambda: self.celsius, read_available_bytes=lambda: 1 << 30,
            ),
        )  # fmt: skip
        broker.handle(STATUS, self._note)

    def _connect(
        self, address: BrokerAddress, client_id: str, *, will: LastWill | None = None, timeout_s: float = 10.0
    ) -> Transport:
        if self.refusals:
            self.refusals -= 1
            raise BrokerError("away")
        self.connections.append(client_id)
        transport = connect(address, client_id, will=will, timeout_s=timeout_s)
        return self.on_connect(transport)

    def on_connect(self, transport: Transport) -> Transport:
        """What the node gets as its connection; tests replace this."""
        return transport

    def _note(self, topic: str, payload: bytes) -> None:
        seen = status.decode_status(payload, "n")
        self.seen.append(seen)
        self.on_status(seen)

    def on_status(self, seen: NodeStatus) -> None:
        """Stop after the third status; tests replace this."""
        if len(self.seen) == 3:
            self.stop.set()

    def other(self, state: str, *, since_unix_ms: int = 0) -> bytes:
        """A status of another process with the same id."""
        online = state == "online"
        document = NodeStatus(
            schema=status.SCHEMA,
            node="n",
            boot_id="other",
            state="online" if online else "offline",
            since_unix_ms=since_unix_ms,
            holding=self.holding if online else None,
        )
        return status.encode_status(document)


@pytest.fixture
def site(runtime: ExpertRuntime) -> Iterator[Site]:
    clock = ManualClock()
    with MemoryBroker(clock=clock, latency_s=0.001) as broker:
        yield Site(broker, clock, runtime)


def test_a_node_announces_itself_renews_its_status_and_leaves(site: Site) -> None:
    site.agent.run(site.stop)
    assert [s.state for s in site.seen] == ["online", "online", "online", "offline"]
    assert site.seen[-1].reason == "stopped"
    assert site.clock.monotonic_s() == pytest.approx(0.5 + 2 * 3.0, abs=0.5)
    late = connect(site.broker.address, "late")
    late.subscribe(STATUS)
    message = late.receive(1.0)
    assert message is not None
    assert message.payload == status.encode_status(site.seen[-1])


def test_a_status_of_a_process_that_died_is_taken_over_after_its_will_is_due(site: Site) -> None:
    site.broker.publish(STATUS, site.other("online"), retain=True)
    site.agent.run(site.stop)
    assert site.seen[0].online
    assert site.clock.monotonic_s() > 15


def test_a_living_process_keeps_its_id_and_learns_of_the_other(site: Site) -> None:
    site.broker.publish(STATUS, site.other("online"), retain=True)

    def on_connect(transport: Transport) -> Transport:
        transport.subscribe(STATUS)
        site.broker.publish(STATUS, site.other("online"), delay_s=3.0)  # its next heartbeat
        return transport

    site.on_connect = on_connect  # type: ignore[method-assign]
    with pytest.raises(DuplicateNodeError, match="choose another --id"):
        site.agent.run(site.stop)
    assert [(s.state, s.refused) for s in site.seen] == [("offline", True)]
    assert site.clock.monotonic_s() < 4


def test_of_two_that_start_at_once_the_later_leaves(site: Site) -> None:
    def on_status(seen: NodeStatus) -> None:
        if seen.online:
            site.broker.publish(STATUS, site.other("online", since_unix_ms=seen.since_unix_ms - 1))

    site.on_status = on_status  # type: ignore[method-assign]
    with pytest.raises(DuplicateNodeError):
        site.agent.run(site.stop)
    assert [s.refused for s in site.seen] == [False, True]


def test_a_node_that_is_too_hot_says_so_until_it_has_cooled_down(site: Site) -> None:
    def on_status(seen: NodeStatus) -> None:
        site.celsius = (90.0, 70.0, 70.0, 70.0)[len(site.seen) - 1]
        if len(site.seen) == 3:
            site.stop.set()

    site.on_status = on_status  # type: ignore[method-assign]
    site.agent.run(site.stop)
    assert [s.state for s in site.seen] == ["online", "offline", "online", "offline"]
    assert "too hot: 90 °C" in site.seen[1].reason


def test_a_lost_connection_leaves_a_will_and_is_opened_again(site: Site) -> None:
    watch = connect(site.broker.address, "watch")
    watch.subscribe(STATUS)

    def on_status(seen: NodeStatus) -> None:
        if len(site.seen) == 1:
            site.refusals = 3
            site.broker.cut(site.connections[0])
        elif len(site.seen) == 2:
            site.stop.set()

    site.on_status = on_status  # type: ignore[method-assign]
    site.agent.run(site.stop)
    assert len(site.connections) == 2
    assert [s.state for s in site.seen] == ["online", "online", "offline"]
    reasons: list[str] = []
    while message := watch.receive(1.0):
        reasons.append(status.decode_status(message.payload, "n").reason)
    assert "connection lost" in reasons


def test_a_broker_that_passes_no_status_on_is_refused(site: Site) -> None:
    def on_connect(transport: Transport) -> Transport:
        subscribe = transport.subscribe

        def allowed(topic_filter: str, *, qos: int = 0, timeout_s: float = 10.0) -> None:
            if topic_filter != STATUS:
                subscribe(topic_filter, qos=qos, timeout_s=timeout_s)

        transport.subscribe = allowed  # type: ignore[method-assign]
        return transport

    site.on_connect = on_connect  # type: ignore[method-assign]
    site.on_status = lambda seen: None  # type: ignore[method-assign]
    with pytest.raises(BrokerAuthError, match="does its access list allow"):
        site.agent.run(site.stop)
    assert len(site.seen) == 3  # one status that comes late is no refusal


def test_a_broker_that_is_slow_once_is_not_a_refusal(site: Site) -> None:
    """Its first status comes back after the first heartbeat: for example after a loss on the air."""

    def on_status(seen: NodeStatus) -> None:
        site.broker.latency_s = 0.001 if len(site.seen) > 1 else 4.0
        if len(site.seen) == 6:
            site.stop.set()

    site.broker.latency_s = 4.0
    site.on_status = on_status  # type: ignore[method-assign]
    site.agent.run(site.stop)
    assert len(site.connections) == 1


def test_a_certificate_that_is_not_valid_yet_does_not_end_a_node(site: Site) -> None:
    fail = [BrokerAuthError("not yet valid", final=False), BrokerError("reset")]

    def on_connect(transport: Transport) -> Transport:
        if len(site.connections) > 1 and fail:
            transport.close()
            raise fail.pop()
        return transport

    def on_status(seen: NodeStatus) -> None:
        if len(site.seen) == 2:
            site.broker.cut(site.connections[0])
        elif seen.online and len(site.connections) > 3:
            site.stop.set()

    site.on_connect = on_connect  # type: ignore[method-assign]
    site.on_status = on_status  # type: ignore[method-assign]
    site.agent.run(site.stop)
    assert fail == []
