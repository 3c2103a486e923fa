"""Parts of a layer's time, measured on a fleet at rest: nodes' computing, and what requests cost besides links.

Layers are asked one by one, without a trunk, of chosen nodes with chosen numbers of rows. The nodes report how long
they computed; what remains of a layer's time, less the link's, is broker, relay, clients, frames and adding up.
"""

import statistics
import time
from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from bs_coordinator.dispatch.dispatcher import Dispatcher
from bs_coordinator.engine.step_records import DispatchRecord
from bs_coordinator.placement.boards import BoardLink
from bs_coordinator.placement.predict import MESSAGE_BYTES, Station
from bs_coordinator.placement.row_curve import RowCurve
from wire.manifest import Dims
from wire.probe import probe_input
from wire.tensors import Array

ROWS = (1, 2, 4, 8)
_ROUNDS = 12
_WARM_UP = 2


class LayerSamples(Struct, frozen=True):
    """Layers with the same work, in ms.

    Attributes:
        at_once: nodes that were asked, each for one unit.
        rows: hidden states that each of them got.
        compute_ms: of the slowest node of each layer.
        rest_ms: of each layer, beyond the slowest node's computing and its link.
        sent_bytes: of a layer's requests and answers.
    """

    at_once: int
    rows: int
    compute_ms: tuple[float, ...]
    rest_ms: tuple[float, ...]
    sent_bytes: int


class FleetParts(Struct, frozen=True):
    """What a fleet's parts take.

    Attributes:
        unit_ms: rows through a unit, on one node while the others rest.
        crowd: how many times as long the slowest of so many nodes takes for a row when they compute at once.
        layer_ms, request_ms, byte_ms: of a layer's time beyond links and computing, by least squares: per layer, per
            request, per byte of requests and answers.
        samples: all that this was computed from.
    """

    unit_ms: RowCurve
    crowd: RowCurve
    layer_ms: float
    request_ms: float
    byte_ms: float
    samples: tuple[LayerSamples, ...]

    def station(self, trunk_s: RowCurve) -> Station:
        """The base station's times in this fleet, with the nodes' own beyond computing."""
        return Station(trunk_s, 1e-3 * self.layer_ms, 1e-3 * self.request_ms, 1e-3 * self.byte_ms)


def measure_parts(dispatcher: Dispatcher, dims: Dims, links: dict[str, BoardLink]) -> FleetParts:
    """Measure a fleet whose links are dedicated.

    Args:
        links: of each node, as they are now.
    """
    counts = sorted({count for count in (1, 2, 4, len(links)) if count <= len(links)})
    cases = [(count, 1) for count in counts] + [(1, rows) for rows in ROWS[1:]] + [(counts[-1], ROWS[-1])]
    found = [_measure(dispatcher, dims, links, count, rows) for count, rows in cases]
    return summarise(found)


def summarise(samples: Sequence[LayerSamples]) -> FleetParts:
    """The parts from samples of layers, with one of a single node and row among them."""
    compute = {(one.at_once, one.rows): statistics.median(one.compute_ms) for one in samples}
    rows = sorted(rows for count, rows in compute if count == 1)
    counts = sorted(count for count, rows in compute if rows == 1)
    # A further row or node never makes a request faster: what looks like that is noise.
    unit_ms = np.maximum.accumulate([compute[1, r] for r in rows])
    crowd = np.maximum.accumulate([compute[count, 1] / max(compute[1, 1], 1e-9) for count in counts])
    rest = np.array([statistics.median(one.rest_ms) for one in samples])
    causes = np.array([[1.0, one.at_once, one.sent_bytes] for one in samples])
    layer_ms, request_ms, byte_ms = _least_squares(causes, rest)
    return FleetParts(
        RowCurve(tuple(rows), tuple(unit_ms.tolist())), RowCurve(tuple(counts), tuple(crowd.tolist())),
        layer_ms, request_ms, byte_ms, tuple(samples),
    )  # fmt: skip


def _least_squares(causes: Array, times: Array) -> tuple[float, float, float]:
    """Costs of the causes, none below zero: Lawson and Hanson 1974, here by trying which of them are zero."""
    best, least = np.zeros(3), np.inf
    for kept in ((0, 1, 2), (0, 1), (0, 2), (1, 2), (0,), (1,), (2,)):
        found = np.zeros(3)
        found[list(kept)] = np.linalg.lstsq(causes[:, kept], times, rcond=None)[0]
        error = float(np.square(causes @ found - times).sum())
        if (found >= 0).all() and error < least:
            best, least = found, error
    return float(best[0]), float(best[1]), float(best[2])


def _measure(dispatcher: Dispatcher, dims: Dims, links: dict[str, BoardLink], at_once: int, rows: int) -> LayerSamples:
    hidden = probe_input(dims.hidden, rows)
    compute_ms, rest_ms, sent_bytes = [], [], 0
    for turn in range(_WARM_UP + _ROUNDS):
        layer = turn % dims.layers
        gate = _gate(dispatcher.assigned()[layer], at_once, rows, turn)
        began = time.perf_counter_ns()
        records = dispatcher.apply(layer, hidden, gate).dispatches
        total_ms = (time.perf_counter_ns() - began) / 1e6
        if turn >= _WARM_UP:
            nodes_ms = [one.durations.compute_ns / 1e6 for one in records]
            compute_ms.append(max(nodes_ms))
            rest_ms.append(total_ms - max(ms + _link_ms(one, links) for ms, one in zip(nodes_ms, records, strict=True)))
            sent_bytes = sum(one.down_bytes + one.up_bytes for one in records)
    return LayerSamples(at_once, rows, tuple(compute_ms), tuple(rest_ms), sent_bytes)


def _gate(holders: Sequence[str | None], at_once: int, rows: int, turn: int) -> Array:
    """A gate [rows, units] that asks `at_once` nodes for one unit each; other nodes and units from turn to turn."""
    units: dict[str, list[int]] = {}
    for unit, node in enumerate(holders):
        if node is not None:
            units.setdefault(node, []).append(unit)
    names = sorted(units)
    gate = np.zeros((rows, len(holders)), np.float32)
    for place in range(at_once):
        mine = units[names[(turn + place) % len(names)]]
        gate[:, mine[turn // len(names) % len(mine)]] = 1.0
    return gate


def _link_ms(record: DispatchRecord, links: dict[str, BoardLink]) -> float:
    link = links[record.node]
    down, up = record.down_bytes + MESSAGE_BYTES, record.up_bytes + MESSAGE_BYTES
    return 1e3 * link.rtt_s + 8e-3 * (down / link.down_mbps + up / link.up_mbps)
