"""Gathers facts about nodes and their links: over the broker, and with iperf3 where a node runs its server."""

import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import closing
from datetime import UTC, datetime

from bs_coordinator.dispatch.dispatcher import Dispatcher
from bs_coordinator.dispatch.readiness import prove_expert
from bs_coordinator.errors import DispatchError
from bs_coordinator.nodes.admission import Admission
from bs_coordinator.nodes.registry import NodeRegistry
from testbed.experiment.clock_rows import node_clocks
from testbed.preflight.iperf import measure_rate
from testbed.preflight.verdicts import NodeFacts, Rate
from wire import status
from wire.broker_address import BrokerAddress
from wire.errors import BrokerError, FrameError
from wire.frame_auth import ClusterKey
from wire.manifest import Manifest
from wire.status import NodeStatus
from wire.tensors import WireDtype
from wire.topics import Topics
from wire.transport import Message, Transport
from wire.transports import connect

_WATCH_S = 4.5
"""Longer than the time between two heartbeats of a node."""
_LINKS_S = 2.5
_CLOCKS_S = 0.5
_ANSWER_S = 8.0
_MOST_PROOFS = 32
"""Most experts that are proven per node, spread over its layers."""
OnProgress = Callable[[str], None]


class _Listener(Transport):
    """A transport that keeps the statuses of all nodes, including nodes that the base station can't use.

    Attributes:
        last: last status of each node.
        boots: boot ids of the processes that reported to be online, by node.
    """

    def __init__(self, transport: Transport, topics: Topics) -> None:
        self.last: dict[str, NodeStatus] = {}
        self.boots: dict[str, set[str]] = defaultdict(set)
        self._transport, self._topics = transport, topics
        self._admission = Admission("statuses")

    def receive(self, timeout_s: float) -> Message | None:
        """Receive a message and keep it if it is a status."""
        message = self._transport.receive(timeout_s)
        node = self._topics.node_of_status(message.topic) if message and message.payload else None
        if message and node is not None and not self._admission.refusal(node, message.arrived_ns / 1e9):
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
        """Close the transport."""
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
    """Gather facts about every node.

    Args:
        named: nodes that the plan names; empty to take all nodes that are online.
        cluster_key: key that authenticates frames, if the cluster has one.
        until: expiry of the nodes' certificates.
        wait_s: longest time to wait for the first status of the named nodes.
        iperf: measure links with iperf3 where nodes run its server; else links are only estimated from pings.
        on_progress: called with each step of the check, in words.

    Raises:
        BrokerError: the broker can't be reached, or the connection was lost.
    """
    topics = Topics(cluster)
    transport = connect(address, f"wdmoe-preflight-{secrets.token_hex(4)}")
    registry = NodeRegistry(manifest.dims, manifest.model_sha256, tagged=cluster_key is not None)
    listener = _Listener(transport, topics)
    with closing(transport):
        dispatcher = Dispatcher(
            listener, topics, registry, dtype=WireDtype.FP16, timeout_s=_ANSWER_S, cluster_key=cluster_key
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
        proofs = {node: _prove(dispatcher, manifest, node, on_progress) for node in sorted(registry.nodes)}
        rates = _rates(dispatcher, registry.nodes.values(), iperf=iperf, on_progress=on_progress)
        samples = dispatcher.telemetry.latest()
    names = sorted({*named, *listener.last})
    return [
        NodeFacts(
            node=node,
            expected=node in named if named else node not in listener.last or listener.last[node].online,
            quantisation=str(manifest.quantisation),
            status=listener.last.get(node),
            ignored=registry.ignored.get(node, ""),
            restarted=len(listener.boots[node]) > 1,
            telemetry=samples[node].telemetry if node in samples else None,
            clock=clocks[node].at(time.time_ns()) if node in clocks else None,
            proven=proofs[node][0] if node in proofs else 0,
            wrong=proofs[node][1] if node in proofs else "",
            rate=rates.get(node),
            until=(until or {}).get(node),
            now=datetime.now(UTC),
        )
        for node in names
    ]


def _prove(dispatcher: Dispatcher, manifest: Manifest, node: str, on_progress: OnProgress) -> tuple[int, str]:
    """Number of experts that passed the probe, and the error of the first one that failed; empty if none did."""
    on_progress(f"{node}: proving experts")
    entries = {entry.id: entry for entry in manifest.experts}
    document = dispatcher.registry.nodes.get(node)
    held = [id for id in document.unit_ids() if id in entries] if document else []
    chosen = held[:: max(1, -(-len(held) // _MOST_PROOFS))]
    for proven, id in enumerate(chosen):
        try:
            prove_expert(dispatcher, manifest, node, entries[id])
        except BrokerError:
            raise
        except DispatchError as error:
            return proven, str(error)
        if node not in dispatcher.registry.nodes:
            return proven, f"went offline while {entries[id].name} was tested"
    return len(chosen), ""


def _rates(
    dispatcher: Dispatcher, nodes: Iterable[NodeStatus], *, iperf: bool, on_progress: OnProgress
) -> dict[str, Rate]:
    """Rates of all links, measured one after another, because nodes may share one channel."""
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
