"""Nodes and alarms as the live page shows them. Pure."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from bs_coordinator.dispatch.health import Health
from bs_coordinator.links.monitor import NodeEstimate
from bs_coordinator.nodes.registry import LOCAL_NODE, NodeRegistry
from bs_coordinator.page.documents import Alarm, LinkView, NodeState, NodeView, Placement
from bs_coordinator.page.step_log import RequestTimes
from wire.experts import format_selector, parse_selector
from wire.status import Holding, NodeStatus
from wire.telemetry import Telemetry

HOT_CELSIUS = 80.0
"""Raspberry Pis slow down from here on."""
BUSY_PER_CORE = 1.5
_MOST_LOST = 64
_MOST_TEXT = 300
"""Longest text of a node that is passed on."""


class SeenNodes:
    """Remembers the nodes that were online, so that one that leaves is shown as lost instead of vanishing."""

    def __init__(self) -> None:
        self._last: dict[str, NodeStatus] = {}

    def update(self, online: Mapping[str, NodeStatus], ignored: Iterable[str]) -> dict[str, NodeStatus]:
        """The last statuses of the nodes that were online and are not any more, at most 64."""
        self._last |= online
        lost = {name: status for name, status in self._last.items() if name not in online}
        for name in [*set(ignored) & lost.keys(), *list(lost)[:-_MOST_LOST]]:
            del self._last[name]
            lost.pop(name, None)
        return lost


def fleet_view(
    registry: NodeRegistry,
    health: Health,
    lost: Mapping[str, NodeStatus],
    estimates: Sequence[NodeEstimate],
    telemetry: Mapping[str, Telemetry],
    requests: Mapping[str, RequestTimes],
) -> list[NodeView]:
    """The base station, if it holds experts itself, and all nodes by name.

    Args:
        lost: last statuses of nodes that have left.
        estimates: of all links.
        telemetry: the last sample of each node.
        requests: what the requests to each node showed.
    """
    links = {estimate.node: _link(estimate) for estimate in estimates}
    views = []
    for name, status in registry.nodes.items():
        views.append(
            _node(status, *_state(health, name), links.get(name), telemetry.get(name), requests.get(name))
        )  # fmt: skip
    views += [_node(status, "lost", status.reason or "it went offline", None, None, requests.get(name))
              for name, status in lost.items()]  # fmt: skip
    if local := registry.local_experts:
        views.append(
            NodeView(
                name=LOCAL_NODE,
                state="online",
                experts=_short(format_selector(local, registry.dims.slices)),
                held=len(local),
            )
        )
    views += [NodeView(name=name, state="ignored", reason=_short(why)) for name, why in registry.ignored.items()]
    return sorted(views, key=lambda view: _local_first(view.name))


def alarms(
    nodes: Sequence[NodeView], lost_experts: str, *, cpu_load: float, running: int, most_running: int
) -> list[Alarm]:
    """What needs attention, the most urgent first.

    Args:
        lost_experts: one line about experts that can't be asked; empty if there are none.
        cpu_load: processes that want to run, per core of the base station.
        running: accepted requests.
        most_running: accepted requests at most.
    """
    found = []
    if lost_experts:
        found.append(Alarm(kind="experts", severe=True, text=f"Experts lost: {_short(lost_experts)}"))
    for node in nodes:
        if node.state != "online":
            text = f"Node {node.name} {'is ' if node.state != 'lost' else ''}{node.state}: {node.reason}"
            found.append(Alarm(kind="node", severe=False, text=text))
    for node in nodes:
        if node.throttling:
            found.append(Alarm(kind="heat", severe=False, text=f"Node {node.name} is slowed down: {node.throttling}"))
        elif node.celsius is not None and node.celsius >= HOT_CELSIUS:
            found.append(Alarm(kind="heat", severe=False, text=f"Node {node.name} is at {node.celsius:.0f} °C"))
    if running >= most_running:
        found.append(Alarm(kind="queue", severe=False, text=f"All {most_running} places for requests are taken"))
    if cpu_load >= BUSY_PER_CORE:
        text = f"The base station's processor is overloaded: {cpu_load:.1f} processes want to run on each core"
        found.append(Alarm(kind="load", severe=False, text=text))
    return found


def placement(assigned: Sequence[Sequence[str | None]], slices: int = 1) -> Placement:
    """Which node each expert is asked of; of an expert in slices, the names of all nodes.

    Args:
        assigned: [layers][units], a node's name, or None where no node can be asked.
        slices: into which each expert is cut.
    """
    if slices > 1:
        assigned = [[_all_of(row[at : at + slices]) for at in range(0, len(row), slices)] for row in assigned]
    names = sorted({name for row in assigned for name in row if name is not None}, key=_local_first)
    index = {name: i for i, name in enumerate(names)}
    return Placement(names, [[-1 if name is None else index[name] for name in row] for row in assigned])


def _all_of(nodes: Sequence[str | None]) -> str | None:
    """The nodes of an expert's slices; None if one can't be asked."""
    names = {node for node in nodes if node is not None}
    return None if None in nodes else ", ".join(sorted(names, key=_local_first))


def _local_first(name: str) -> tuple[bool, str]:
    return name != LOCAL_NODE, name


def _state(health: Health, name: str) -> tuple[NodeState, str]:
    if health.usable(name):
        return "online", ""
    return "asked last" if health.doubted(name) else "left out", health.why(name)


def _node(
    status: NodeStatus, state: NodeState, reason: str, link: LinkView | None, telemetry: Telemetry | None,
    requests: RequestTimes | None,
) -> NodeView:  # fmt: skip
    device = status.device
    measured = requests.measured_ms if requests else None
    predicted = requests.predicted_ms if requests else None
    return NodeView(
        name=status.node,
        state=state,
        reason=_short(reason),
        host=_short(status.machine.host) if status.machine else "",
        device=_short(f"{device.profile}, {device.provider}") if device else "",
        experts=_short(status.holding.experts) if status.holding else "",
        held=_held(status.holding) if status.holding else 0,
        link=link,
        measured_ms=round(measured.value, 3) if measured else None,
        predicted_ms=round(predicted.value, 3) if predicted else None,
        celsius=telemetry.thermal.soc_celsius if telemetry else None,
        throttling=telemetry.thermal.throttling_now if telemetry else None,
        rssi_dbm=telemetry.wifi.rssi_dbm if telemetry and telemetry.wifi else None,
        watts=telemetry.power.board_watts if telemetry else None,
    )


@lru_cache(maxsize=256)
def _held(holding: Holding) -> int:
    """Number of a node's experts, or slices; kept, because snapshots are frequent and selectors can be long."""
    dims = holding.dims
    return len(parse_selector(holding.experts, layers=dims.layers, experts=dims.experts, slices=dims.slices))


def _link(estimate: NodeEstimate) -> LinkView:
    link = estimate.link
    return LinkView(
        rtt_ms=_finite(1e3 * link.rtt_s), down_mbps=_finite(link.down_mbps), up_mbps=_finite(link.up_mbps),
        samples=link.samples, stale=estimate.stale,
    )  # fmt: skip


def _finite(value: float) -> float:
    return round(value, 3) if math.isfinite(value) else 0.0


def _short(text: str) -> str:
    return text if len(text) <= _MOST_TEXT else text[: _MOST_TEXT - 1] + "…"
