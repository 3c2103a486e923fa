"""Metrics of the model's steps, from their records: stages, layers, and each node's requests."""

from collections import defaultdict
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics import MetricWrapperBase

from bs_coordinator.engine.step_records import DispatchRecord, Phase, StepRecord, TimeSplit

_PHASES: tuple[Phase, ...] = ("prefill", "decode")
_STAGES = tuple(TimeSplit.__dataclass_fields__)
_STEP_S = (0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10, 30)
_LAYER_S = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1, 5)
_NODE_S = (0.0001, 0.0003, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.512, 2)


class _Node(NamedTuple):
    """The time series of one node."""

    round_trip: Histogram
    compute: Histogram
    queue: Histogram
    rows: Counter
    down: Counter
    up: Counter
    predicted: Counter
    error: Counter


class StepMetrics:
    """Adds up step records."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Nothing is counted yet."""
        self._step = _by_phase(
            Histogram(
                "wdmoe_step_duration_seconds",
                "Forward steps, each for all answers that are running.",
                ["phase"],
                buckets=_STEP_S,
                registry=registry,
            )
        )
        stage = Histogram(
            "wdmoe_step_stage_duration_seconds",
            "Parts of steps along their critical path.",
            ["phase", "stage"],
            buckets=_STEP_S,
            registry=registry,
        )
        self._stage = {(phase, part): stage.labels(phase, part) for phase in _PHASES for part in _STAGES}
        self._layer = _by_phase(
            Histogram(
                "wdmoe_layer_dispatch_duration_seconds",
                "Per layer of a step, from the chosen experts to their combined output.",
                ["phase"],
                buckets=_LAYER_S,
                registry=registry,
            )
        )
        self._families: tuple[MetricWrapperBase, ...] = (
            Histogram(
                "wdmoe_node_round_trip_duration_seconds",
                "Requests to nodes, from handing the request to the network to reading its answer from the socket.",
                ["node"],
                buckets=_NODE_S,
                registry=registry,
            ),
            Histogram(
                "wdmoe_node_compute_duration_seconds",
                "Computing experts, by the node's own clock.",
                ["node"],
                buckets=_NODE_S,
                registry=registry,
            ),
            Histogram(
                "wdmoe_node_queue_duration_seconds",
                "From a request's arrival at the node to its decoding, by the node's own clock.",
                ["node"],
                buckets=_NODE_S,
                registry=registry,
            ),
            Counter("wdmoe_node_rows", "Hidden states that nodes computed.", ["node"], registry=registry),
            Counter("wdmoe_node_down_bytes", "Frames of requests to nodes.", ["node"], registry=registry),
            Counter("wdmoe_node_up_bytes", "Frames of answers from nodes.", ["node"], registry=registry),
            Counter(
                "wdmoe_node_round_trip_predicted_seconds",
                "Round trips as predicted at sending; the measured sum is that of the histogram of round trips.",
                ["node"],
                registry=registry,
            ),
            Counter(
                "wdmoe_node_round_trip_prediction_error_seconds",
                "Absolute differences between predicted and measured round trips.",
                ["node"],
                registry=registry,
            ),
        )
        self._nodes: dict[str, _Node] = {}

    @property
    def nodes(self) -> list[str]:
        """Nodes that have time series."""
        return list(self._nodes)

    def observe(self, step: StepRecord) -> None:
        """Take in a step. Each step counts once, however many answers shared it."""
        phase = step.phase
        self._step[phase].observe(step.total_ns / 1e9)
        split = step.split_ns()
        for part in _STAGES:
            self._stage[phase, part].observe(getattr(split, part) / 1e9)
        by_node: defaultdict[str, list[DispatchRecord]] = defaultdict(list)
        for layer in step.layers:
            if layer.dispatches:
                self._layer[phase].observe(layer.dispatch_ns / 1e9)
            for dispatch in layer.dispatches:
                by_node[dispatch.node].append(dispatch)
        for node, dispatches in by_node.items():
            self._observe_node(self._nodes.get(node) or self._add(node), dispatches)

    def drop(self, node: str) -> None:
        """Remove a node's time series."""
        if self._nodes.pop(node, None) is not None:
            for family in self._families:
                family.remove(node)

    def _observe_node(self, series: _Node, dispatches: list[DispatchRecord]) -> None:
        for dispatch in dispatches:
            series.round_trip.observe(dispatch.round_trip_ns / 1e9)
            series.compute.observe(dispatch.durations.compute_ns / 1e9)
            series.queue.observe(dispatch.durations.queue_ns / 1e9)
        # One addition per step: each takes a lock.
        series.rows.inc(sum(d.tokens for d in dispatches))
        series.down.inc(sum(d.down_bytes for d in dispatches))
        series.up.inc(sum(d.up_bytes for d in dispatches))
        series.predicted.inc(sum(d.predicted_ns for d in dispatches) / 1e9)
        series.error.inc(sum(abs(d.predicted_ns - d.round_trip_ns) for d in dispatches) / 1e9)

    def _add(self, node: str) -> _Node:
        series = self._nodes[node] = _Node._make(family.labels(node) for family in self._families)
        return series


def _by_phase(family: Histogram) -> dict[Phase, Histogram]:
    return {phase: family.labels(phase) for phase in _PHASES}
