"""What is known of the nodes at one moment, read on the thread that owns the dispatcher and passed to others."""

from collections.abc import Mapping
from dataclasses import dataclass

from bs_coordinator.dispatch.dispatcher import Dispatcher
from bs_coordinator.links import NodeEstimate
from bs_coordinator.nodes.telemetry_inbox import ReceivedTelemetry
from wire.status import NodeStatus

_FRESH_S = 30.0
"""Older telemetry no longer describes a device; nodes send it once a second."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The nodes at one moment. Nothing in it changes later.

    Attributes:
        statuses: of the nodes online, by name.
        usable: names of those that may be asked; the others are left out after failures.
        failures: how often each node was `failed`, `quarantined` or `doubted`, by the node's name and this word.
        estimates: of links and nodes that are online.
        telemetry: newest samples of nodes online, by name, without old ones.
        dropped: messages that were of no use, by reason.
        resent: requests that were sent again, by reason.
        experts, local, missing: of the model, those of them that the base station keeps, and those without a holder;
            all counted by slices if experts are cut.
        lost: whether some expert can't be asked.
    """

    statuses: Mapping[str, NodeStatus]
    usable: frozenset[str]
    failures: Mapping[tuple[str, str], int]
    estimates: tuple[NodeEstimate, ...]
    telemetry: Mapping[str, ReceivedTelemetry]
    dropped: Mapping[str, int]
    resent: Mapping[str, int]
    experts: int
    local: int
    missing: int
    lost: bool


def take_snapshot(dispatcher: Dispatcher) -> Snapshot:
    """Read the dispatcher, on its own thread."""
    registry, health, now_ns = dispatcher.registry, dispatcher.health, dispatcher.clock.perf_ns()
    statuses = registry.nodes
    oldest_ns = now_ns - int(1e9 * _FRESH_S)
    return Snapshot(
        statuses=statuses,
        usable=frozenset(node for node in statuses if health.usable(node)),
        failures=dict(health.counts),
        estimates=tuple(known for known in dispatcher.links.estimates(now_ns / 1e9) if known.node in statuses),
        telemetry={
            node: sample
            for node, sample in dispatcher.telemetry.latest().items()
            if node in statuses and sample.monotonic_ns >= oldest_ns
        },
        dropped=dispatcher.dropped,
        resent=dispatcher.resent,
        experts=registry.dims.layers * registry.dims.units,
        local=len(registry.local_experts),
        missing=len(registry.missing()),
        lost=bool(dispatcher.describe_lost()),
    )
