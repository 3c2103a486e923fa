"""Estimates of all links and nodes, what requests are predicted to cost, and which probe to send next.

Pure: times come with the samples and the questions, so a recorded log can be replayed.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from bs_coordinator.links.budget import ProbeBudget
from bs_coordinator.links.compute import ComputeEstimator
from bs_coordinator.links.cross_traffic import MIN_LAYER_BYTES, CrossTraffic
from bs_coordinator.links.estimator import KNOWN_SAMPLES, LinkEstimate, LinkEstimator, LinkSample
from bs_coordinator.links.loads import LoadEstimator
from bs_coordinator.links.probes import Probe, ProbeChooser, uses
from bs_coordinator.nodes.registry import LOCAL_NODE
from bs_coordinator.selection.forecast import LayerForecast
from wire.status import SocketFacts

_MAX_CONTENTION = 0.8
"""Most of a round trip that may be attributed to other nodes' frames: their estimates may be wrong."""


@dataclass(frozen=True, slots=True)
class NodeEstimate:
    """The estimate of a node.

    Attributes:
        node: name of the node.
        link: estimate of its link.
        fixed_s, expert_s, row_s: the node's own time, per request, per distinct expert and per row.
        requests: number of requests that these times are based on.
        stale: there were no samples for too long; the node is not trusted to be faster than the typical node.
        probing: what probes took so far.
    """

    node: str
    link: LinkEstimate
    fixed_s: float
    expert_s: float
    row_s: float
    requests: int
    stale: bool
    probing: "Probing"


@dataclass(frozen=True, slots=True)
class Probing:
    """Pings and packet trains of one node so far, or of all.

    Attributes:
        down_bytes: frames sent to the node.
        up_bytes: frames of its answers.
        refused: probes that did not fit into the budget (`links.budget`).
    """

    down_bytes: int = 0
    up_bytes: int = 0
    refused: int = 0


_Sizes = tuple[int, int, int, int]


class _Node:
    """The estimators of one node.

    Whoever changes one of them calls `changed`.
    """

    __slots__ = ("_costs", "_sizes", "compute", "link", "loads", "most_rows")

    def __init__(self, link: LinkEstimator) -> None:
        self.link = link
        self.compute = ComputeEstimator()
        self.loads = LoadEstimator()
        self.most_rows = 0
        self._sizes: _Sizes | None = None
        self._costs = (0.0, 0.0, 0.0, 0.0)

    def changed(self) -> None:
        """Take in that an estimate has changed."""
        self._sizes = None

    def costs(self, sizes: _Sizes) -> tuple[float, float, float, float]:
        """Predicted seconds of an empty request, per distinct expert, and per row on the link and on the node.

        Each layer's forecast asks this of all nodes, of which only a few have answered since the last layer's.

        Args:
            sizes: bytes of an empty request and of an empty answer, and what a row adds to each.
        """
        if sizes != self._sizes:
            fixed_s, expert_s, row_s = self.compute.costs_s
            link_s, down_s, up_s = self.link.costs_s
            link_s += sizes[0] * down_s + sizes[1] * up_s
            self._costs = link_s + fixed_s, expert_s + self.loads.expert_s, sizes[2] * down_s + sizes[3] * up_s, row_s
            self._sizes = sizes
        return self._costs


class _NoLink(LinkEstimator):
    """The link of the base station to itself: costs nothing and is always known."""

    __slots__ = ()

    def observe(self, sample: LinkSample) -> bool:
        """Ignore the sample."""
        return True

    def predict_s(self, down_bytes: float, up_bytes: float) -> float:
        """Zero."""
        return 0.0

    @property
    def costs_s(self) -> tuple[float, float, float]:
        """Zero."""
        return 0.0, 0.0, 0.0

    def stale(self, now_s: float) -> bool:
        """Never."""
        return False


class LinkMonitor:
    """The estimates of all nodes.

    Attributes:
        shared_air: whether all links share one half-duplex channel.
    """

    def __init__(self, *, shared_air: bool = False, log: Callable[[LinkSample], None] = lambda sample: None) -> None:
        """A monitor that knows nothing yet.

        Args:
            shared_air: all links share one half-duplex channel, so air times add up.
            log: called with each sample, for replay.
        """
        self.shared_air = shared_air
        self._log = log
        self._budget = ProbeBudget()
        self._probe_bytes: Counter[tuple[str, bool]] = Counter()
        self._refused: Counter[str] = Counter()
        self.forget()

    def forget(self) -> None:
        """Drop all estimates."""
        self._nodes: dict[str, _Node] = {}
        self._cross_traffic = CrossTraffic()
        self._budget.forget()
        self._probes = ProbeChooser(self._budget, self._refused)

    def observe(self, samples: Sequence[LinkSample]) -> None:
        """Take in the samples of one layer's requests, in the order in which they were sent; or one probe's."""
        if len(samples) > 1:
            samples = self._with_contention(samples) if self.shared_air else self._without_cross_traffic(samples)
        for sample in samples:
            if sample.node != LOCAL_NODE:
                self._log(sample)
            node = self._node(sample.node)
            node.changed()
            self._observe_link(node.link, sample)
            if sample.rows:
                self._observe_work(node, sample)
            else:
                self._probes.answered(sample.node)

    def _observe_link(self, link: LinkEstimator, sample: LinkSample) -> None:
        """Update the link, and plan probes if the sample is unusual."""
        alarms = link.alarms
        if not sample.queued and link.observe(sample) and sample.train:
            n_bytes = sample.down_bytes or sample.up_bytes
            way = "down" if sample.down_bytes else "up"
            self._budget.took((sample.node, way), sample.network_s / n_bytes * sample.train_bytes)
        if link.alarms > alarms:
            self._probes.jumped(sample)
        elif sample.train and (link.down_trains if sample.down_bytes else link.up_trains).odd:
            self._probes.odd_train(sample)

    def _observe_work(self, node: _Node, sample: LinkSample) -> None:
        """Update the node's own times from a request."""
        self._probes.worked(sample.node, sample.time_s)
        if sample.node != LOCAL_NODE:
            self._budget.worked(sample.time_s)
        node.most_rows = max(node.most_rows, sample.rows)
        computing_s = sample.node_s - sample.load_s
        node.compute.observe(sample.time_s, experts=sample.experts, rows=sample.rows, node_s=computing_s)
        node.loads.observe(sample.load_s, sample.experts)

    def answered(self, node: str) -> None:
        """Take in that a probe of `node` came back, even if it gave no sample."""
        self._probes.answered(node)

    def anchor(self, node: str, facts: SocketFacts, *, towards_node: bool, time_s: float) -> None:
        """Take in the kernel's statistics of the socket that sends in one direction of a node's link.

        Args:
            node: name of the node.
            facts: of the socket.
            towards_node: whether it is the broker's socket (True) or the node's own (False).
            time_s: when they were read.
        """
        known = self._node(node)
        known.changed()
        known.link.anchor(facts, towards_node=towards_node, time_s=time_s)

    def predict_s(self, node: str, *, down_bytes: int, up_bytes: int, experts: int, rows: int) -> float:
        """Predicted round trip of a request, as if no other node used the channel."""
        link_s = self.link_s(node, down_bytes=down_bytes, up_bytes=up_bytes)
        known = self._node(node)
        return link_s + known.compute.predict_s(experts, rows) + experts * known.loads.expert_s

    def worst_load_s(self, node: str, *, experts: int) -> float:
        """How much longer a request may take if the node has to load experts; 0 if it keeps all in memory."""
        return experts * self._node(node).loads.worst_s

    def link_s(self, node: str, *, down_bytes: int, up_bytes: int) -> float:
        """Predicted time of a request on the link, without the node's own time."""
        return self._node(node).link.predict_s(down_bytes, up_bytes)

    def next_probe(self, nodes: Iterable[str], now_s: float) -> Probe | None:
        """The probe to send now to one of `nodes`, if any. It counts as sent."""
        known = [(name, self._node(name).link) for name in nodes]
        return self._probes.next_probe(known, now_s, shared_air=self.shared_air)

    def spend(self, probe: Probe, now_s: float, *, anyway: bool = False) -> bool:
        """Count a ping that `next_probe` did not choose as sent, if it fits into the budget; returns whether it does.

        Args:
            probe: the ping.
            now_s: by the clock of the samples.
            anyway: count it even if it does not fit.
        """
        needed = uses(probe, self._node(probe.node).link)
        fits = self._budget.spend(needed, now_s, shared_air=self.shared_air, anyway=anyway)
        if not (fits or anyway):
            self._refused[probe.node] += 1
        return fits

    def count_probe(self, node: str, *, down_bytes: int = 0, up_bytes: int = 0) -> None:
        """Take in that frames of a probe were sent, or came back."""
        self._probe_bytes[node, True] += down_bytes
        self._probe_bytes[node, False] += up_bytes

    def probing(self, node: str | None = None) -> Probing:
        """What probes took so far, of `node` or of all nodes."""
        if node is None:
            down, up = (
                sum(n for (_, is_down), n in self._probe_bytes.items() if is_down is way) for way in (True, False)
            )
            return Probing(down, up, self._refused.total())
        return Probing(self._probe_bytes[node, True], self._probe_bytes[node, False], self._refused[node])

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
            layer: index of the layer.
            nodes: names of the holders.
            holder: intp [experts], index in `nodes` of each expert's holder.
            available: bool [experts], which experts can be asked; None for all.
            now_s: by the clock of the samples.
            frame_bytes: length of an empty request and of an empty answer.
            row_bytes: what one row adds to the request and to the answer.
        """
        sizes = (*frame_bytes, *row_bytes)
        known = [self._node(name) for name in nodes]
        values = np.array([node.costs(sizes) for node in known]).T
        stale = [node.link.stale(now_s) for node in known]
        if any(stale):
            silent = np.array(stale)
            trusted = values if silent.all() else values[:, ~silent]
            values[:, silent] = np.maximum(values[:, silent], np.median(trusted, axis=1)[:, None])
        fixed_s, expert_s, row_air_s, row_compute_s = values
        return LayerForecast(layer, holder, fixed_s, expert_s, row_air_s, row_compute_s, self.shared_air, available)

    def experience(self, node: str) -> tuple[int, int]:
        """Number of requests that the predictions for `node` are based on, and the most rows in one of them."""
        known = self._node(node)
        return known.compute.samples, known.most_rows

    def estimates(self, now_s: float) -> list[NodeEstimate]:
        """Estimates of all nodes except the base station, by name, with the uncertainty that they have by now."""
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
                    probing=self.probing(name),
                )
            )
        return result

    def _node(self, name: str) -> _Node:
        known = self._nodes.get(name)
        if known is None:
            known = self._nodes[name] = _Node(_NoLink() if name == LOCAL_NODE else LinkEstimator())
        return known

    def _without_cross_traffic(self, samples: Sequence[LinkSample]) -> Sequence[LinkSample]:
        """The samples, with the wait for each other in shared processes as their contention."""
        remote = [sample for sample in samples if sample.node != LOCAL_NODE]
        if len(remote) < 2 or sum(sample.down_bytes + sample.up_bytes for sample in remote) < MIN_LAYER_BYTES:
            return samples
        links = [self._node(sample.node).link for sample in remote]
        if all(link.samples >= KNOWN_SAMPLES for link in links):
            predicted_s = [
                link.predict_s(sample.down_bytes, sample.up_bytes) for link, sample in zip(links, remote, strict=True)
            ]
            self._cross_traffic.learn(remote, predicted_s)
        return [*self._cross_traffic.subtract(remote), *(s for s in samples if s.node == LOCAL_NODE)]

    def _with_contention(self, samples: Sequence[LinkSample]) -> list[LinkSample]:
        """The samples, with the air time of frames that went first as their contention.

        These are requests sent before and answers that arrived before.
        """
        result = []
        for i, sample in enumerate(samples):
            before_s = 0.0
            for j, other in enumerate(samples):
                link = self._node(other.node).link
                if j < i:
                    before_s += other.down_bytes * link.down_s_per_byte
                if j != i and other.time_s <= sample.time_s:
                    before_s += other.up_bytes * link.up_s_per_byte
            most_s = _MAX_CONTENTION * (sample.round_trip_s - sample.node_s)
            result.append(replace(sample, contention_s=max(0.0, min(before_s, most_s))))
        return result
