"""Predicts the time of a token and of a prompt for a given assignment of experts to devices. Pure.

A layer takes `trunk + station + answered`, where `answered` is the time until the last asked device has answered
(`bs_coordinator.selection.forecast.answered_s`), and device k, asked for `units` of its units, takes

    time_k = rtt_k + node_k + units · crowd · unit_k(pairs / units) + down / down_rate_k + up / up_rate_k

with `down` and `up` the bytes of its request and answer, `pairs` the number of (hidden state, unit) pairs, and
`unit_k(rows)` the time of so many hidden states through one unit: the first reads its weights, further ones only
compute. `crowd` is how much slower devices are that share one machine's memory; boards of their own don't.

`station` is what the base station does one after the other for all devices that it asks: `layer + requests · request
+ bytes · byte`, bytes of requests and answers together.

Which devices are asked is averaged over draws of experts by their frequencies.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bs_coordinator.dispatch.assignment import RequestCost
from bs_coordinator.placement.boards import Board
from bs_coordinator.placement.row_curve import RowCurve
from bs_coordinator.placement.shapes import ModelShape, Variant
from bs_coordinator.selection.forecast import Float, Index, answered_s
from wire.frames import HEADER_BYTES, RESULT_BYTES, ROW_BYTES
from wire.tensors import Array

PIECE_ROWS = 128
"""Most rows of a micro-batch. A prompt passes through the layers in micro-batches, all in progress at once."""
LAYER_S = 0.3e-3
"""Time per layer for forecast and choice of experts, beside other processes: 8 to 11 ms per token of 30 layers
(docs/performance.md, "Decode against the floor")."""
REQUEST_S = 0.18e-3
"""Time that the base station takes per request, from planning to adding up: 11 to 12 ms per token of 30 layers with two
small requests each (same table)."""
BYTE_S = 2e-9
"""Time that the base station takes per byte of a request or an answer: half of what 64 KiB take longer than 8 KiB
through broker, client and node (docs/performance.md, "Transport", loopback)."""
TRUNK_BYTES_PER_S = 200e9
"""Assumed memory bandwidth with which a trunk reads its weights, that of a laptop's GPU."""
TRUNK_ROW_SHARE = 0.02
"""Assumed time of a further row in the trunk, as a share of a token's."""
NO_CROWD = RowCurve((1,), (1.0,))
"""Devices that don't slow each other down."""
LOCAL = -1
"""Stands for the base station where `Assignment` names a device."""
MESSAGE_BYTES = 100
"""Bytes of a message around its frame: MQTT's topic and header, TCP and IP."""
_VALUE_BYTES = 2
"""Hidden states travel in fp16."""
_DRAWS = 128
"""Draws of a token's experts per layer."""
_LEAST_DRAWS = 4


class Station(NamedTuple):
    """The base station's own times, in seconds.

    Attributes:
        trunk_s: trunk and head, by the rows of a step.
        layer_s: per layer, whatever is asked.
        request_s: per request of a layer, from planning to adding up.
        byte_s: per byte of requests and answers.
        unit_s: rows through a unit that the base station keeps itself.
    """

    trunk_s: RowCurve
    layer_s: float = LAYER_S
    request_s: float = REQUEST_S
    byte_s: float = BYTE_S
    unit_s: RowCurve = RowCurve((1,), (0.0,))


class Step(NamedTuple):
    """A predicted step of the model.

    Attributes:
        seconds: of the whole step.
        answered_s: part of it in which answers of devices are awaited.
        asked: mean number of devices that a layer asks.
        read_bytes: mean over layers of the bytes that the device with most work reads.
        air_s: mean time per layer that requests and answers of all devices take on the air.
        busiest_s: mean over layers of the longest time for which one device computes, or its link or the shared channel
            is busy.
    """

    seconds: float
    answered_s: float
    asked: float
    read_bytes: float
    air_s: float
    busiest_s: float


class Routing:
    """Draws of the experts that tokens ask."""

    def __init__(
        self, traffic: Array, top_k: int, *, seed: int = 0, recorded: Mapping[int, Index] = MappingProxyType({})
    ) -> None:
        """Take what is known of the routing.

        Args:
            traffic: float32 [layers, experts], how often each expert is asked, above 0; only ratios count.
            top_k: experts that a token asks.
            seed: of the draws.
            recorded: by the number of rows, intp [steps, layers, rows, k], the experts that steps really asked; these
                stand for all steps of as many rows.
        """
        self.traffic = traffic
        self._top_k = top_k
        self._seed = seed
        self._drawn: dict[int, Index] = dict(recorded)

    def draws(self, rows: int) -> Index:
        """intp [draws, layers, rows, k]: the experts of so many tokens, recorded, or drawn independently of each other.

        A token's experts are drawn one after the other without replacement, in proportion to their frequencies. The
        tokens of a text resemble each other, so a real step of several rows asks somewhat fewer experts.
        """
        if rows not in self._drawn:
            count = max(_LEAST_DRAWS, _DRAWS // rows)
            rng = np.random.default_rng(self._seed)
            weights = np.log(self.traffic.astype(np.float64))[None, :, None, :]
            # The k largest of log-weights plus Gumbel noise are such a draw (Efraimidis and Spirakis 2006).
            keys = weights + rng.gumbel(size=(count, self.traffic.shape[0], rows, self.traffic.shape[1]))
            self._drawn[rows] = np.argpartition(-keys, self._top_k - 1, axis=-1)[..., : self._top_k].astype(np.intp)
        return self._drawn[rows]


@dataclass(frozen=True)
class Costs:
    """Costs of all devices of a fleet for one variant.

    Attributes:
        boards: the devices.
        shared_air: whether all links share one channel.
        crowd: how many times as long units take when so many devices compute at once, because they share a machine.
    """

    shape: ModelShape
    variant: Variant
    boards: Sequence[Board]
    shared_air: bool
    crowd: RowCurve = NO_CROWD

    @cached_property
    def waits_s(self) -> Float:
        """float64 [nodes], round trip and the node's own time per request."""
        return np.array([board.link.rtt_s + board.node_s for board in self.boards])

    @cached_property
    def units_s(self) -> list[RowCurve]:
        """By device, rows through a unit."""
        return [board.unit_s(self.shape, self.variant) for board in self.boards]

    @cached_property
    def bytes_s(self) -> Float:
        """float64 [nodes, 2], seconds per byte to the device and from it."""
        return np.array([[8e-6 / board.link.down_mbps, 8e-6 / board.link.up_mbps] for board in self.boards])

    def message_bytes(self, rows: NDArray[np.integer], pairs: NDArray[np.integer]) -> tuple[Float, Float]:
        """float64 [..., nodes] each, bytes of requests and of answers; 0 where no row goes."""
        values = rows * (self.shape.hidden * _VALUE_BYTES)
        down = MESSAGE_BYTES + HEADER_BYTES + values + pairs * ROW_BYTES
        up = MESSAGE_BYTES + RESULT_BYTES + values
        return np.where(rows > 0, down, 0.0), np.where(rows > 0, up, 0.0)

    def air_s(self, rows: NDArray[np.integer], pairs: NDArray[np.integer]) -> Float:
        """float64 [..., nodes], time of requests and answers on the air; 0 where no row goes."""
        down, up = self.message_bytes(rows, pairs)
        return down * self.bytes_s[:, 0] + up * self.bytes_s[:, 1]

    def compute_s(self, units: NDArray[np.integer], pairs: NDArray[np.integer]) -> Float:
        """float64 [..., nodes], computing time; the rows of a request spread evenly over its units."""
        rows = pairs / np.maximum(units, 1)
        alone_s = np.stack([units[..., k] * curve.at(rows[..., k]) for k, curve in enumerate(self.units_s)], axis=-1)
        at_once = np.count_nonzero(units, axis=-1, keepdims=True)
        slowed: Float = alone_s * self.crowd.at(np.maximum(at_once, 1))
        return slowed

    def row_ms(self) -> list[float]:
        """By device, ms of one hidden state there, through a unit and back."""
        return [1e3 * cost.seconds(1) for cost in self.requests]

    @cached_property
    def requests(self) -> list[RequestCost]:
        """By device, what requests cost."""
        one = np.ones(len(self.boards), np.intp)
        first_s = np.array([curve.first for curve in self.units_s])
        one_s, two_s = (self.waits_s + n * first_s + self.air_s(n * one, n * one) for n in (1, 2))
        return [RequestCost.of(*pair) for pair in zip(one_s.tolist(), two_s.tolist(), strict=True)]


def predict_step(costs: Costs, holders: Index, routing: Routing, rows: int, station: Station) -> Step:
    """Predict one step of the model.

    Args:
        costs: of the devices.
        holders: intp [layers, units], index of the device that is asked for each unit; `LOCAL` for the base station.
        routing: which experts tokens ask.
        rows: hidden states of the step, drafts included.
        station: the base station's own times.
    """
    rows_of, units_of, pairs_of = _asked(holders, routing.draws(rows), costs.variant.slices, len(costs.boards))
    local_units, local_pairs = units_of[..., LOCAL], pairs_of[..., LOCAL]
    rows_of, units_of, pairs_of = (counts[..., :LOCAL] for counts in (rows_of, units_of, pairs_of))
    air_s = costs.air_s(rows_of, pairs_of)
    compute_s = costs.compute_s(units_of, pairs_of)
    asked = rows_of > 0
    time_s = np.where(asked, costs.waits_s + compute_s + air_s, 0.0)
    local_rows = local_pairs / np.maximum(local_units, 1)
    local_s = local_units * station.unit_s.at(local_rows)
    down, up = costs.message_bytes(rows_of, pairs_of)
    requests, sent = asked.sum(axis=-1), (down + up).sum(axis=-1)
    station_s = np.where(requests > 0, station.layer_s + requests * station.request_s + sent * station.byte_s, 0.0)
    waited_s = np.maximum(answered_s(time_s, air_s, shared_air=costs.shared_air) + station_s, local_s)
    channel_s = air_s.sum(axis=-1) if costs.shared_air else air_s.max(axis=-1)
    answered = float(waited_s.mean(axis=0).sum())
    return Step(
        seconds=float(station.trunk_s.at(rows)) + answered,
        answered_s=answered,
        asked=float(asked.sum(axis=-1).mean()),
        read_bytes=float(units_of.max(axis=-1).mean()) * costs.variant.unit_bytes,
        air_s=float(air_s.sum(axis=-1).mean()),
        busiest_s=float(np.maximum(compute_s.max(axis=-1), channel_s).mean()),
    )


def predict_prompt_s(costs: Costs, holders: Index, routing: Routing, tokens: int, station: Station) -> float:
    """Predicted seconds until a prompt of `tokens` has gone through the model.

    Its pieces overlap, so the time is that of one piece, or all pieces' time at what is busiest (trunk, a device's
    cores, or a link) and one layer of the rest, whichever is longer.
    """
    pieces = -(-tokens // PIECE_ROWS)
    rows = -(-tokens // pieces)
    one = predict_step(costs, holders, routing, rows, station)
    layers = costs.shape.layers
    busiest_s = max((one.seconds - one.answered_s) / layers, one.busiest_s)
    return max(one.seconds, pieces * layers * busiest_s + one.seconds / layers - busiest_s)


def _asked(
    holders: Index, experts: Index, slices: int, nodes: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
    """intp [draws, layers, nodes + 1] each: hidden states, units and pairs asked of each device, the base station last.

    Args:
        holders: as for `predict_step`.
        experts: intp [draws, layers, rows, k].
    """
    draws, layers, rows, _ = experts.shape
    units = (experts[..., None] * slices + np.arange(slices)).reshape(draws, layers, rows, -1)
    layer = np.arange(layers)[None, :, None, None]
    asked = holders[layer, units] % (nodes + 1)
    hit = np.zeros((draws, layers, rows, nodes + 1), np.bool_)
    np.put_along_axis(hit, asked, True, axis=-1)
    wanted = np.zeros((draws, layers, holders.shape[1]), np.bool_)
    np.put_along_axis(wanted, units.reshape(draws, layers, -1), True, axis=-1)
    place = np.arange(draws * layers).reshape(draws, layers, 1) * (nodes + 1)
    shape, size = (draws, layers, nodes + 1), draws * layers * (nodes + 1)
    pairs = np.bincount((place + asked.reshape(draws, layers, -1)).ravel(), minlength=size).reshape(shape)
    owners = place + np.broadcast_to(holders % (nodes + 1), wanted.shape)
    distinct = np.bincount(owners[wanted], minlength=size).reshape(shape)
    return hit.sum(axis=2), distinct, pairs
