"""Checks before the first prompt: the broker is fast, every expert has a holder, and every node computes.

A heartbeat proves none of this, so each check sends real traffic.
"""

import logging
from collections.abc import Callable

import numpy as np

from bs_coordinator.dispatch.dispatcher import Dispatcher
from bs_coordinator.errors import BrokerDelayError, DispatchError, PlacementError
from bs_coordinator.nodes.registry import LOCAL_NODE
from common.clock import SYSTEM_CLOCK, Clock
from wire.errors import BrokerError
from wire.manifest import ExpertEntry, Manifest
from wire.probe import probe_error, probe_input
from wire.transport import Transport

log = logging.getLogger(__name__)

_NAGLE_MS = 30.0
"""A missing TCP_NODELAY costs at least 40 ms in nearly every burst."""
_ECHOES = 9
_WARM_UP = 24
"""Single messages sent first: a new TCP connection acknowledges its first 16 segments at once."""
_BURST_LENGTH = 3
_REVIEW_S = 1.0
_LOCAL_EXPERTS_TRIED = 16
_SPARE_NODE_S = 5.0
"""How long a node may take for its first token if other nodes hold all its experts."""
_PROBE_ERROR = 0.5
"""Relative error at which a node's answer is not this model's: quantisation stays below 0.2, another expert's
output is at about 1.4."""


def measure_broker(transport: Transport, topic: str, *, timeout_s: float = 10.0, clock: Clock = SYSTEM_CLOCK) -> float:
    """Median round trip of a small message through the broker and back, in ms.

    Nagle's algorithm never delays a single message; without TCP_NODELAY, all messages of a burst but the first wait
    for an acknowledgement. Lower quartiles are compared, so that neither one quick burst nor a busy host decides.

    Raises:
        BrokerDelayError: bursts show that delay.
        BrokerError: an echo did not come back in time.
    """
    transport.subscribe(topic)
    for _ in range(_WARM_UP):
        _echo_ms(transport, topic, 1, timeout_s, clock)
    singles_ms = [_echo_ms(transport, topic, 1, timeout_s, clock) for _ in range(_ECHOES)]
    bursts_ms = [_echo_ms(transport, topic, _BURST_LENGTH, timeout_s, clock) for _ in range(_ECHOES)]
    extra_ms = float(np.quantile(bursts_ms, 0.25) - np.quantile(singles_ms, 0.25))
    if extra_ms > _NAGLE_MS:
        raise BrokerDelayError(
            f"a burst through the broker takes {extra_ms:.0f} ms longer than one message: it runs "
            "without TCP_NODELAY; write 'set_tcp_nodelay true' into mosquitto.conf and restart it"
        )
    return float(np.median(singles_ms))


def _echo_ms(transport: Transport, topic: str, count: int, timeout_s: float, clock: Clock) -> float:
    token = clock.perf_ns().to_bytes(8, "little")
    began_ns = clock.perf_ns()
    # Sent one by one, a message could carry the acknowledgement that the broker waits for.
    with transport.in_one_segment():
        for i in range(count):
            transport.publish(topic, token + bytes([i]))
    deadline = clock.monotonic_s() + timeout_s
    arrived = 0
    while arrived < count:
        message = transport.receive(max(0.0, deadline - clock.monotonic_s()))
        if message is None:
            raise BrokerError(
                f"a message on {topic} did not come back within {timeout_s:g} s: check the broker's access list"
            )
        arrived += message.topic == topic and message.payload[:8] == token
    return (clock.perf_ns() - began_ns) / 1e6


def wait_for_experts(dispatcher: Dispatcher, *, timeout_s: float, on_wait: Callable[[str], None] | None = None) -> None:
    """Wait until every expert of the model has a holder.

    Args:
        on_wait: called with one line about what is missing, at once and whenever that changes.

    Raises:
        PlacementError: some are still missing at the deadline.
    """
    deadline = dispatcher.clock.monotonic_s() + timeout_s
    reported, next_review_s = "", 0.0
    dispatcher.pump(0.2)  # for the retained statuses of nodes that are online already
    while dispatcher.registry.missing():
        line = dispatcher.registry.describe_missing()
        if dispatcher.clock.monotonic_s() >= deadline:
            raise PlacementError(f"after {timeout_s:g} s {line}")
        if on_wait and line != reported:
            on_wait(line)
            reported = line
        # Experts that no node holds may be kept locally; a node that is only late gets its experts back.
        review = dispatcher.clock.monotonic_s() >= next_review_s
        if dispatcher.local is not None:
            dispatcher.local.tend(review=review)
        next_review_s = dispatcher.clock.monotonic_s() + _REVIEW_S if review else next_review_s
        dispatcher.pump(0.2)


def try_local_experts(dispatcher: Dispatcher, manifest: Manifest) -> None:
    """Compute some of the local experts once, so that their cost is known from the first token on.

    Raises:
        ExpertsLostError: the base station can't compute one of them.
    """
    x = probe_input(manifest.dims.hidden)
    for id in sorted(dispatcher.registry.local_experts)[:_LOCAL_EXPERTS_TRIED]:
        gate = np.zeros((1, manifest.dims.units), np.float32)
        gate[0, id.expert] = 1.0
        dispatcher.ask(LOCAL_NODE, id.layer, x, gate)


def prove_nodes(dispatcher: Dispatcher, manifest: Manifest) -> dict[str, float]:
    """Send one token to one expert of every node, and check its answer.

    A node that fails is left out, with a warning, if others hold all its experts.

    Returns:
        Round trip in ms by node.

    Raises:
        DispatchError: a node does not answer, refuses, or gives another output than this model's expert, and no other
            node holds some of its experts.
    """
    round_trip_ms: dict[str, float] = {}
    entries = {entry.id: entry for entry in manifest.experts}
    failed: set[str] = set()
    for node, status in sorted(dispatcher.registry.nodes.items()):
        ids = [id for id in status.unit_ids() if id in entries]
        if not ids:
            continue
        spare = all({*dispatcher.registry.holders(id)} - failed - {node} for id in ids)
        try:
            round_trip_ms[node] = prove_expert(
                dispatcher, manifest, node, entries[ids[0]], timeout_s=_SPARE_NODE_S if spare else None
            )
        except DispatchError as error:
            if not spare:
                raise
            failed.add(node)
            if dispatcher.health.usable(node):
                dispatcher.health.failed(node, dispatcher.clock.perf_ns() / 1e9, str(error))
            log.warning("%s; other nodes hold its experts, so it is not needed", error)
    return round_trip_ms


def prove_expert(
    dispatcher: Dispatcher, manifest: Manifest, node: str, entry: ExpertEntry, *, timeout_s: float | None = None
) -> float:
    """Send one token to one expert of one node, check its answer, and give the round trip in ms.

    Args:
        timeout_s: how long to wait at most; the dispatcher's own limit if None.

    Raises:
        DispatchError: the node does not answer, refuses, or gives another output than this model's expert.
    """
    gate = np.zeros((1, manifest.dims.units), np.float32)
    gate[0, entry.id.expert] = 1.0
    x = probe_input(manifest.dims.hidden)
    answer = dispatcher.ask(node, entry.layer, x, gate, timeout_s=timeout_s)
    error = probe_error(entry.probe_output, answer.output[0])
    if not error < _PROBE_ERROR:
        why = "its output for a test token is not this model's"
        dispatcher.health.failed(node, dispatcher.clock.perf_ns() / 1e9, why, quarantine=True)
        raise DispatchError(
            f"node '{node}' answers {entry.name} with something else than this model's expert "
            f"(relative error {error:.2g}): is its bundle the same?"
        )
    return answer.dispatches[0].round_trip_ns / 1e6
