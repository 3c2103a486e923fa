"""All links and nodes of a fleet: what is known, what to expect, and what should be probed next.

Pure: times come with the samples and the questions, so that a recorded log can be replayed.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from bs_coordinator.links.compute import ComputeEstimator
from bs_coordinator.links.cross_traffic import CROWD_BYTES, CrossTraffic
from bs_coordinator.links.estimator import KNOWN_SAMPLES, LinkEstimate, LinkEstimator, LinkSample
from bs_coordinator.links.loads import LoadEstimator
from bs_coordinator.links.packet_train import plan_train
from bs_coordinator.nodes.registry import LOCAL_NODE
from bs_coordinator.selection.forecast import LayerForecast
from wire.status import SocketFacts

PROBE_EVERY_S = 0.1
"""Between two probes of the fleet, while nothing is wrong."""
_HURRIED_EVERY_S = 0.02
_TRAIN_EVERY_S, _SURE_EVERY_S = 0.5, 2.0
"""Between two trains on a link that is in use, the directions in turn; and where both rates are well known."""
_SURE_RATE = 0.08
"""Relative standard deviation of a rate that is."""
_TRAIN_SHARE, _HURRIED_SHARE = 0.02, 0.25
"""Of each direction's time that trains may take while nothing is wrong; of shared air, then and else."""
_CHECK_EVERY_S = 3.0
"""When one link has jumped, the others are looked at: what they share may be the reason. Not more often than this."""
_LOST_S = 2.0
"""A probe without an answer for this long is forgotten, and another may be sent."""
_UNSURE_RTT = 0.3
_MOST_CONTENTION = 0.8


class _Kind(Enum):
    PING = 0
    DOWN = 1
    UP = 2


_CHECK = (_Kind.DOWN, _Kind.UP)
_AT_FIRST = (_Kind.PING, *_CHECK, *_CHECK, _Kind.PING, *_CHECK)
_AFTER_JUMP = (*_CHECK, _Kind.PING)
"""If it is the rates that have jumped, these trains are odd, and others follow until they agree."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Pings that would teach most: payload bytes there and back of each.

    Attributes:
        count: more than one are a train, sent back to back.
        lead: of a train, see `links.train`.
    """

    node: str
    down_bytes: int
    up_bytes: int
    count: int = 1
    lead: int = 0


@dataclass(frozen=True, slots=True)
class NodeEstimate:
    """What is believed of a node.

    Attributes:
        link: see there.
        fixed_s, expert_s, row_s: the node's own time, per request, distinct expert and row.
        requests: that these stand on.
        stale: it has been silent for too long, so that it is not trusted to be faster than the typical node.
    """

    node: str
    link: LinkEstimate
    fixed_s: float
    expert_s: float
    row_s: float
    requests: int
    stale: bool


class _Node:
    __slots__ = (
        "compute",
        "last_train",
        "link",
        "loads",
        "most_rows",
        "next_train_s",
        "probed_s",
        "wanted",
        "worked_s",
    )

    def __init__(self, link: LinkEstimator) -> None:
        self.link = link
        self.compute = ComputeEstimator()
        self.loads = LoadEstimator()
        self.probed_s = self.next_train_s = self.worked_s = -math.inf
        self.wanted = list(_AT_FIRST)
        self.last_train = _Kind.UP
        self.most_rows = 0


class _NoLink(LinkEstimator):
    """Of the base station to itself."""

    __slots__ = ()

    def observe(self, sample: LinkSample) -> bool:
        """There is nothing to learn."""
        return True

    def predict_s(self, down_bytes: float, up_bytes: float) -> tuple[float, float]:
        """Nothing."""
        return 0.0, 0.0

    @property
    def costs_s(self) -> tuple[float, float, float]:
        """Nothing."""
        return 0.0, 0.0, 0.0

    def stale(self, now_s: float) -> bool:
        """Never."""
        return False


class LinkMonitor:
    """The estimates of all nodes."""

    def __init__(self, *, shared_air: bool = False, log: Callable[[LinkSample], None] = lambda sample: None) -> None:
        """Begin without knowledge.

        Args:
            shared_air: all links share one half-duplex channel, so that air times add up.
            log: told every sample, for replay.
        """
        self.shared_air = shared_air
        self._log = log
        self._nodes: dict[str, _Node] = {}
        self._crowd = CrossTraffic()
        self._outstanding: dict[str, float] = {}
        self._last_probe_s = self._checked_s = -math.inf
        self._last_air_s = 0.0

    def forget(self) -> None:
        """Begin again without knowledge."""
        self._nodes.clear()
        self._crowd = CrossTraffic()
        self._outstanding.clear()
        self._last_probe_s = self._checked_s = -math.inf
        self._last_air_s = 0.0

    def observe(self, samples: Sequence[LinkSample]) -> None:
        """Take in what one layer's requests took, in the order in which they were sent; or one probe."""
        if len(samples) > 1:
            samples = self._with_contention(samples) if self.shared_air else self._without_crowd(samples)
        for sample in samples:
            if sample.node != LOCAL_NODE:
                self._log(sample)
            node = self._node(sample.node)
            alarms = node.link.alarms
            if not sample.queued:
                node.link.observe(sample)
            if node.link.alarms > alarms:
                # Trains that found a jump have measured it already; the other direction may have jumped as well, and
                # other links. Work may as well have waited for something on its way.
                node.wanted = list(_CHECK if sample.train else _AFTER_JUMP)
                if sample.train:
                    self._check_others(sample.time_s)
            elif sample.train:
                # Chance or change: the next one of that direction tells.
                trains, kind = (
                    (node.link.down_trains, _Kind.DOWN) if sample.down_bytes else (node.link.up_trains, _Kind.UP)
                )
                if trains.odd and kind not in node.wanted:
                    node.wanted.append(kind)
            if sample.rows:
                node.worked_s = sample.time_s
                node.most_rows = max(node.most_rows, sample.rows)
                computing_s = sample.node_s - sample.load_s
                node.compute.observe(sample.time_s, experts=sample.experts, rows=sample.rows, node_s=computing_s)
                node.loads.observe(sample.load_s, sample.experts)
            else:
                self.answered(sample.node)

    def answered(self, node: str) -> None:
        """A probe of `node` came back, whether it said something or not."""
        self._outstanding.pop(node, None)

    def anchor(self, node: str, facts: SocketFacts, *, towards_node: bool, time_s: float) -> None:
        """Take in the kernel's account of one direction, see `LinkEstimator.anchor`."""
        self._node(node).link.anchor(facts, towards_node=towards_node, time_s=time_s)

    def predict_s(self, node: str, *, down_bytes: int, up_bytes: int, experts: int, rows: int) -> float:
        """Predicted round trip of a request, alone on the air."""
        link_s = self.link_s(node, down_bytes=down_bytes, up_bytes=up_bytes)
        known = self._node(node)
        return link_s + known.compute.predict_s(experts, rows) + experts * known.loads.expert_s

    def worst_load_s(self, node: str, *, experts: int) -> float:
        """What reading experts into memory may take on top of that; 0 for a node that keeps all of its."""
        return experts * self._node(node).loads.worst_s

    def link_s(self, node: str, *, down_bytes: int, up_bytes: int) -> float:
        """The link's part of it."""
        return self._node(node).link.predict_s(down_bytes, up_bytes)[0]

    def next_probe(self, nodes: Iterable[str], now_s: float) -> Probe | None:
        """The probe to send now, if any: first nodes that are stale, then those whose link has jumped or is unsure,
        then those whose rates were not measured for a while.

        Asking takes the probe as sent.
        """
        known = [(name, self._node(name)) for name in nodes]
        hurried = any(node.wanted for _, node in known)
        pause_s = _HURRIED_EVERY_S if hurried else PROBE_EVERY_S
        if self.shared_air:
            # Who shares the air with the last probe waits for it, and has to share it with answers.
            pause_s += self._last_air_s / (_HURRIED_SHARE if hurried else _TRAIN_SHARE)
        if now_s < self._last_probe_s + pause_s:
            return None
        candidates = [
            (urgency, node.probed_s, name)
            for name, node in known
            if now_s - self._outstanding.get(name, -math.inf) > _LOST_S and (urgency := self._urgency(node, now_s))
        ]
        if not candidates:
            return None
        name = min(candidates)[2]
        node = self._nodes[name]
        node.probed_s = self._outstanding[name] = self._last_probe_s = now_s
        probe, self._last_air_s = _probe(name, node, _next_kind(node, now_s))
        if probe.count > 1:
            # The directions take turns, so that each has twice that time.
            every_s = _SURE_EVERY_S if max(node.link.relative_std()[1:]) < _SURE_RATE else _TRAIN_EVERY_S
            node.next_train_s = now_s + max(every_s, 0.5 * self._last_air_s / _TRAIN_SHARE)
        return probe

    def forecast(
        self,
        layer: int,
        nodes: Sequence[str],
        holder: NDArray[np.intp],
        *,
        available: NDArray[np.bool_] | None = None,
        now_s: float,
        frame_bytes: tuple[int, int],
        row_bytes: tuple[int, int],
    ) -> LayerForecast:
        """What asking a layer's experts is predicted to cost.

        Args:
            nodes: names, in the order that `holder` counts in.
            holder, available: by expert, see `LayerForecast`.
            frame_bytes: of an empty request and an empty answer.
            row_bytes: that one row adds to the request and to the answer.
        """
        costs, stale = [], []
        for name in nodes:
            known = self._node(name)
            fixed_s, expert_s, row_s = known.compute.costs_s
            expert_s += known.loads.expert_s
            link_s, down_s, up_s = known.link.costs_s
            link_s += frame_bytes[0] * down_s + frame_bytes[1] * up_s
            costs.append((link_s + fixed_s, expert_s, row_bytes[0] * down_s + row_bytes[1] * up_s, row_s))
            stale.append(known.link.stale(now_s))
        values = np.array(costs).T
        if any(stale):
            silent = np.array(stale)
            trusted = values if silent.all() else values[:, ~silent]
            values[:, silent] = np.maximum(values[:, silent], np.median(trusted, axis=1)[:, None])
        fixed_s, expert_s, row_air_s, row_compute_s = values
        return LayerForecast(layer, holder, fixed_s, expert_s, row_air_s, row_compute_s, self.shared_air, available)

    def experience(self, node: str) -> tuple[int, int]:
        """How many requests of `node` its predictions stand on, and the most rows that one of them had."""
        known = self._node(node)
        return known.compute.samples, known.most_rows

    def estimates(self, now_s: float) -> list[NodeEstimate]:
        """All nodes, by name, as unsure as they are by now; not the base station itself."""
        result = []
        for name, node in sorted(self._nodes.items()):
            if name == LOCAL_NODE:
                continue
            node.link.advance(now_s)
            fixed_s, expert_s, row_s = node.compute.costs_s
            result.append(
                NodeEstimate(
                    node=name,
                    link=node.link.estimate(),
                    fixed_s=fixed_s,
                    expert_s=expert_s,
                    row_s=row_s,
                    requests=node.compute.samples,
                    stale=node.link.stale(now_s),
                )
            )
        return result

    def _node(self, name: str) -> _Node:
        known = self._nodes.get(name)
        if known is None:
            known = self._nodes[name] = _Node(_NoLink() if name == LOCAL_NODE else LinkEstimator())
        return known

    def _check_others(self, time_s: float) -> None:
        if time_s - self._checked_s > _CHECK_EVERY_S:
            self._checked_s = time_s
            for other in self._nodes.values():
                other.wanted = other.wanted or list(_CHECK)

    def _urgency(self, node: _Node, now_s: float) -> int:
        """0: nothing to ask; else the smaller, the sooner."""
        if node.link.stale(now_s):
            return 1
        if node.wanted:
            return 2
        if node.link.unsure_of_rates() or node.link.relative_std()[0] > _UNSURE_RTT:
            return 3
        return 4 if node.worked_s > node.probed_s and now_s > node.next_train_s else 0

    def _without_crowd(self, samples: Sequence[LinkSample]) -> Sequence[LinkSample]:
        """Less what they waited for each other on machines that all messages pass."""
        away = [sample for sample in samples if sample.node != LOCAL_NODE]
        if len(away) < 2 or sum(sample.down_bytes + sample.up_bytes for sample in away) < CROWD_BYTES:
            return samples
        links = [self._node(sample.node).link for sample in away]
        if all(link.samples >= KNOWN_SAMPLES for link in links):
            predicted_s = [
                link.predict_s(sample.down_bytes, sample.up_bytes)[0] for link, sample in zip(links, away, strict=True)
            ]
            self._crowd.learn(away, predicted_s)
        return [*self._crowd.take_off(away), *(sample for sample in samples if sample.node == LOCAL_NODE)]

    def _with_contention(self, samples: Sequence[LinkSample]) -> list[LinkSample]:
        """Others' frames that were presumably on the air first: requests sent before, answers that arrived before."""
        result = []
        for i, sample in enumerate(samples):
            before_s = 0.0
            for j, other in enumerate(samples):
                link = self._node(other.node).link
                if j < i:
                    before_s += other.down_bytes * link.down_s_per_byte
                if j != i and other.time_s <= sample.time_s:
                    before_s += other.up_bytes * link.up_s_per_byte
            # Some of the time must remain the link's own: the others' estimates may be wrong.
            most_s = _MOST_CONTENTION * (sample.round_trip_s - sample.node_s)
            result.append(replace(sample, contention_s=max(0.0, min(before_s, most_s))))
        return result


def _next_kind(node: _Node, now_s: float) -> _Kind:
    link = node.link
    if node.wanted:
        return node.wanted.pop(0)
    rtt, down, up = link.relative_std()
    if link.stale(now_s) or (rtt > _UNSURE_RTT and not link.unsure_of_rates()):
        return _Kind.PING
    if link.unsure_of_rates():
        return _Kind.DOWN if down > up else _Kind.UP
    return _Kind.DOWN if node.last_train is _Kind.UP else _Kind.UP


def _probe(name: str, node: _Node, kind: _Kind) -> tuple[Probe, float]:
    """And its time on the air."""
    link = node.link
    if kind is _Kind.PING:
        return Probe(name, 0, 0), 0.0
    node.last_train = kind
    _, down, up = link.relative_std()
    if kind is _Kind.DOWN:
        s_per_byte, std, noise_s = link.down_s_per_byte, down, link.down_trains.noise_s
    else:
        s_per_byte, std, noise_s = link.up_s_per_byte, up, link.up_trains.noise_s
    # As slow as the link may well be: a train that is too short is repeated, one that is too long is in the way.
    s_per_byte *= 1 + min(std, 1.0)
    train = plan_train(s_per_byte, link.rtt_s, noise_s)
    sizes = (train.message_bytes, 0) if kind is _Kind.DOWN else (0, train.message_bytes)
    return Probe(name, *sizes, train.count, train.lead), train.count * train.message_bytes * s_per_byte
