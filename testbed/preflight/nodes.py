"""What nodes and their links are like now, by asking them: over the broker, and by iperf3 where it serves."""

import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import closing
from datetime import UTC, datetime

from bs_coordinator.dispatch.dispatcher import Dispatcher
from bs_coordinator.dispatch.readiness import prove_expert
from bs_coordinator.errors import DispatchError
from bs_coordinator.nodes.registry import NodeRegistry
from testbed.experiment.clock_rows import node_clocks
from testbed.preflight.iperf import measure_rate
from testbed.preflight.verdicts import NodeFacts, Rate
from wire import status
from wire.broker_url import BrokerAddress
from wire.errors import BrokerError, FrameError
from wire.frame_auth import ClusterKey
from wire.manifest import Manifest
from wire.status import NodeStatus
from wire.tensors import WireDtype
from wire.topics import Topics
from wire.transport import Message, Transport
from wire.transports import connect

_WATCH_S = 4.5
"""Longer than from one heartbeat of a node to its next."""
_LINKS_S = 2.5
_CLOCKS_S = 0.5
_ANSWER_S = 8.0
_MOST_PROOFS = 32
"""Experts per node, spread over its layers."""
OnProgress = Callable[[str], None]


class _Listener(Transport):
    """A transport that keeps what nodes say of themselves, also those that nobody can use.

    Attributes:
        last: status by node.
        boots: processes that said they were online, by node.
    """

    def __init__(self, transport: Transport, topics: Topics) -> None:
        self.last: dict[str, NodeStatus] = {}
        self.boots: dict[str, set[str]] = defaultdict(set)
        self._transport, self._topics = transport, topics

    def receive(self, timeout_s: float) -> Message | None:
        """See `Transport.receive`."""
        message = self._transport.receive(timeout_s)
        node = self._topics.node_of_status(message.topic) if message and message.payload else None
        if message and node is not None:
            try:
                document = status.decode_status(message.payload, node)
            except FrameError:
                return message
            if not document.refused:
                self.last[node] = document
                if document.online and not message.retained:
                    self.boots[node].add(document.boot_id)
        return message

    def subscribe(self, topic_filter: str, *, qos: int = 0, timeout_s: float = 10.0) -> None:
        """Subscribe and wait for the broker's confirmation."""
        self._transport.subscribe(topic_filter, qos=qos, timeout_s=timeout_s)

    def publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> None:
        """Hand a message to the network."""
        self._transport.publish(topic, payload, qos=qos, retain=retain)

    def publish_confirmed(self, topic: str, payload: bytes, *, retain: bool, timeout_s: float = 10.0) -> None:
        """Publish and wait for the broker's acknowledgement."""
        self._transport.publish_confirmed(topic, payload, retain=retain, timeout_s=timeout_s)

    def close(self) -> None:
        """See `Transport.close`."""
        self._transport.close()


def gather(
    address: BrokerAddress,
    cluster: str,
    manifest: Manifest,
    *,
    named: Collection[str],
    cluster_key: ClusterKey | None = None,
    until: Mapping[str, datetime] | None = None,
    wait_s: float = 0.0,
    iperf: bool = True,
    on_progress: OnProgress = lambda line: None,
) -> list[NodeFacts]:
    """Ask every node.

    Args:
        named: nodes that there should be; empty for whoever is there.
        until: when nodes' certificates run out.
        wait_s: how long to wait for the named nodes to be heard of.
        iperf: measure links with iperf3 where nodes serve it; else by pings alone.
        on_progress: told what is being done.

    Raises:
        BrokerError: the broker can't be reached, or was lost.
    """
    topics = Topics(cluster)
    transport = connect(address, f"wdmoe-preflight-{secrets.token_hex(4)}")
    fleet = NodeRegistry(manifest.dims, manifest.model_sha256)
    listener = _Listener(transport, topics)
    with closing(transport):
        dispatcher = Dispatcher(
            listener, topics, fleet, dtype=WireDtype.FP16, timeout_s=_ANSWER_S, cluster_key=cluster_key
        )
        on_progress("listening to the nodes")
        deadline = time.monotonic() + wait_s
        dispatcher.pump(_WATCH_S)
        while set(named) - set(listener.last) and time.monotonic() < deadline:
            dispatcher.pump(0.5)
        on_progress("probing links and clocks")
        dispatcher.measure_links(_LINKS_S)
        dispatcher.measure_clocks(_CLOCKS_S)
        clocks = node_clocks([("before", sample) for sample in dispatcher.clock_samples()])
        wrong = {node: _prove(dispatcher, manifest, node, on_progress) for node in sorted(fleet.nodes)}
        rates = _rates(dispatcher, fleet.nodes.values(), iperf=iperf, on_progress=on_progress)
        told = dispatcher.telemetry.latest()
    names = sorted({*named, *listener.last})
    return [
        NodeFacts(
            node=node,
            expected=node in named if named else node not in listener.last or listener.last[node].online,
            quantisation=str(manifest.quantisation),
            status=listener.last.get(node),
            ignored=fleet.ignored.get(node, ""),
            restarted=len(listener.boots[node]) > 1,
            telemetry=told[node].telemetry if node in told else None,
            clock=clocks[node].at(time.time_ns()) if node in clocks else None,
            proven=wrong[node][0] if node in wrong else 0,
            wrong=wrong[node][1] if node in wrong else "",
            rate=rates.get(node),
            until=(until or {}).get(node),
            now=datetime.now(UTC),
        )
        for node in names
    ]


def _prove(dispatcher: Dispatcher, manifest: Manifest, node: str, on_progress: OnProgress) -> tuple[int, str]:
    """How many experts answered rightly, and what was wrong with the first one that did not."""
    on_progress(f"{node}: proving experts")
    entries = {entry.id: entry for entry in manifest.experts}
    document = dispatcher.registry.nodes.get(node)
    held = [id for id in document.expert_ids() if id in entries] if document else []
    chosen = held[:: max(1, -(-len(held) // _MOST_PROOFS))]
    for proven, id in enumerate(chosen):
        try:
            prove_expert(dispatcher, manifest, node, entries[id])
        except BrokerError:
            raise
        except DispatchError as error:
            return proven, str(error)
        if node not in dispatcher.registry.nodes:
            return proven, f"left while {id} was asked of it"
    return len(chosen), ""


def _rates(
    dispatcher: Dispatcher, nodes: Iterable[NodeStatus], *, iperf: bool, on_progress: OnProgress
) -> dict[str, Rate]:
    """One node after the other: on one channel they would share it."""
    rates = {
        known.node: Rate(
            known.link.down_mbps, known.link.up_mbps, "pings", known.link.down_std_mbps, known.link.up_std_mbps
        )
        for known in dispatcher.links.estimates(time.perf_counter())
    }
    for node in list(nodes) if iperf else ():
        if node.uplink is None:
            continue
        on_progress(f"{node.node}: iperf3")
        host = node.uplink.endpoint.rpartition(":")[0].strip("[]")
        if (rate := measure_rate(host)) is not None:
            rates[node.node] = rate
        dispatcher.pump(0.2)
    return rates
