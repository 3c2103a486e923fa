"""Estimate of one node's link from the round trips of messages.

A message of `down` bytes to a node and its answer of `up` bytes take, without the node's own time,
`rtt + down / R_down + up / R_up`, and for work `handling` more: what both sides spend on a request without
reporting it, such as waking up. The state (rtt, 1/R_down, 1/R_up, handling) is tracked by a robust Kalman filter.
While all messages have the same size, the four can't be separated. Packet trains (`links.packet_train`) measure the
rates, the kernel's statistics of the sockets give first values (`anchor`), and empty pings separate the handling.
All sizes are payload bytes, so rates are goodput.

Pure: time comes with the samples, so recorded traces can be replayed.
"""

import math
from dataclasses import dataclass

from msgspec import Struct

from bs_coordinator.links.kalman import RobustFilter
from bs_coordinator.links.packet_train import RateWindow, held_up
from bs_coordinator.links.recent import RecentLeast
from wire.status import SocketFacts

_Vector = tuple[float, float, float, float]

# The filter's units are ms and ms per 1000 bytes, so that all states are about 1: 8 Mbit/s is 1 ms per 1000 bytes.
_PRIOR = (5.0, 0.16, 0.16, 0.2)
_PRIOR_STD = (20.0, 0.5, 0.5, 0.5)
_FLOOR = (0.01, 8e-5, 8e-5, 1e-3)
_DRIFT = (0.02, 0.02, 0.02, 0.05)
_FIRST_NOISE = 0.3
_MIN_NOISE = 0.02
_TRANSFER_ERROR = 0.06
"""Relative error of the linear model for large messages: slow start, pacing, acknowledgements on shared air."""
KNOWN_SAMPLES = 3
"""With fewer samples, a link counts as unknown."""
_KNOWN_ERROR = 0.5
"""Standard deviation of a round trip or a rate, as a share of it, from which it counts as not measured."""
_NEGLIGIBLE_S = 1e-4
"""A round trip that is known up to this is known well enough, however short it is: handling a message takes longer."""
_SILENCE_S = 15.0
_UNSURE_RATE = 0.12
_RTT_TURN_S, _PASSED_TURN_S = 10.0, 300.0
"""How long the quickest messages are remembered, once to twice (`RecentLeast`)."""
_PLAUSIBLE_S = 600.0

_RTT_ABOVE_TCP_MS = 0.4
"""What broker and clients add to the kernel's smallest round trip; the anchor's standard deviation includes it too."""
_RTT_ANCHOR_ERROR = 0.25
_SEEDED = 3
_RATE_ANCHOR_ERROR = 0.25
_RATE_BOUND_SLACK = 1.3
"""The kernel's rate of a short burst may exceed what the link sustains."""
_LEAST_INFORMATIVE_MBPS = 0.1


class LinkSample(Struct, frozen=True):
    """One message to a node and its answer, or the part of a packet train between its first and last arrival.

    Attributes:
        time_s: when the answer arrived, by a monotonic clock.
        node: name of the node.
        down_bytes: length of the frame to the node.
        up_bytes: length of the frame from the node.
        round_trip_s: by the base station's clock; for a train, from the first counted arrival to the last.
        node_s: the time that the node reports for itself, to be subtracted.
        experts, rows: distinct experts and hidden states of a request; 0 for probes.
        contention_s: estimated wait for other nodes' frames, on shared air or in processes that all messages pass, to
            be subtracted too.
        load_s: the part of `node_s` spent on loading experts into memory.
        queued: the node had to answer other requests first, so the round trip says little about the link.
        train: the sample is of a packet train (`links.packet_train`): `round_trip_s` contains no round trip.
        train_bytes: of all messages of a train; 0 if not known.
        train_s: from sending its first message to the arrival of the last.
    """

    time_s: float
    node: str
    down_bytes: int
    up_bytes: int
    round_trip_s: float
    node_s: float
    experts: int = 0
    rows: int = 0
    contention_s: float = 0.0
    load_s: float = 0.0
    queued: bool = False
    train: bool = False
    train_bytes: int = 0
    train_s: float = 0.0

    @property
    def network_s(self) -> float:
        """Time on the link, in the broker and in both MQTT clients."""
        return self.round_trip_s - self.node_s - self.contention_s


@dataclass(frozen=True, slots=True)
class LinkEstimate:
    """The estimate of a link.

    Attributes:
        time_s: of the newest sample.
        samples: number of samples so far.
        rtt_s: round trip of an empty message.
        down_mbps: goodput to the node, 10⁶ bit/s.
        up_mbps: goodput from the node, 10⁶ bit/s.
        rtt_std_s, down_std_mbps, up_std_mbps: standard deviations of the three.
        noise_s: jitter: standard deviation of one round trip.
    """

    time_s: float
    samples: int
    rtt_s: float
    rtt_std_s: float
    down_mbps: float
    down_std_mbps: float
    up_mbps: float
    up_std_mbps: float
    noise_s: float


def rtt_known(rtt_s: float, std_s: float) -> bool:
    """Whether a round trip is known well enough to decide by."""
    return std_s < max(_KNOWN_ERROR * rtt_s, _NEGLIGIBLE_S)


def rate_known(mbps: float, std_mbps: float) -> bool:
    """Whether a rate is more than a lower bound: messages take measurable time beyond the round trip."""
    return std_mbps < _KNOWN_ERROR * mbps


class LinkEstimator:
    """Estimates one link.

    Attributes:
        rejected: number of samples that were ignored as implausible (negative, not finite).
        down_trains, up_trains: results of packet trains, by direction.
    """

    __slots__ = (
        "_filter",
        "_least_rtt",
        "_passed",
        "_sampled_s",
        "_time_s",
        "down_trains",
        "rejected",
        "up_trains",
    )

    def __init__(self) -> None:
        self.rejected = 0
        self._least_rtt = RecentLeast(_RTT_TURN_S)
        self._passed = RecentLeast(_PASSED_TURN_S), RecentLeast(_PASSED_TURN_S)
        self.down_trains, self.up_trains = RateWindow(), RateWindow()
        self._time_s = self._sampled_s = -math.inf
        self._filter = RobustFilter(
            _PRIOR, _PRIOR_STD, drift=_DRIFT, floor=_FLOOR, noise=_FIRST_NOISE, least_noise=_MIN_NOISE
        )

    def observe(self, sample: LinkSample) -> bool:
        """Take in a sample; returns False if it is implausible."""
        network_s = sample.network_s
        if not (
            0 < network_s < _PLAUSIBLE_S
            and 0 <= sample.down_bytes < 1 << 32
            and 0 <= sample.up_bytes < 1 << 32
            and math.isfinite(sample.time_s)
            and 0 <= sample.contention_s < _PLAUSIBLE_S
        ):
            self.rejected += 1
            return False
        self.advance(sample.time_s)
        self._sampled_s = max(self._sampled_s, sample.time_s)
        self._observe_passed(sample)
        if sample.train:
            return self._observe_train(sample)
        self._least_rtt.observe(sample.time_s, sample.round_trip_s - sample.node_s)
        h = _h(sample.down_bytes, sample.up_bytes, work=sample.rows > 0)
        z = 1e3 * network_s
        filter = self._filter
        if filter.count == 0:
            filter.noise = max(_FIRST_NOISE, 0.1 * z)
        # The contention is itself an estimate: assume an error of half of it.
        filter.update(h, z, extra_std=self._model_std(h) + 0.5e3 * sample.contention_s)
        return True

    def _observe_train(self, sample: LinkSample) -> bool:
        down = sample.down_bytes > 0
        n_bytes = sample.down_bytes or sample.up_bytes
        if not n_bytes:
            self.rejected += 1
            return False
        rate = self.down_trains if down else self.up_trains
        least_rtt_s = self._least_rtt.least(sample.time_s)
        if sample.train_bytes and held_up(sample.train_s, sample.train_bytes, sample.network_s / n_bytes, least_rtt_s):
            rate.held_up += 1
            return False
        if rate.observe(sample.time_s, sample.network_s, n_bytes):
            self._filter.alarm()
        ms = 1e6 * rate.s_per_byte
        self._filter.replace(1 if down else 2, ms, rate.std * ms)
        return True

    def _observe_passed(self, sample: LinkSample) -> None:
        """Take in how many bytes passed in what time, the round trip included."""
        if sample.train:
            took_s = sample.train_s
            down, up = (sample.train_bytes, 0) if sample.down_bytes else (0, sample.train_bytes)
        else:
            took_s = sample.round_trip_s - sample.node_s
            down, up = sample.down_bytes, sample.up_bytes
        for passed, n_bytes in zip(self._passed, (down, up), strict=True):
            if n_bytes:
                passed.observe(sample.time_s, took_s / n_bytes)

    def anchor(self, facts: SocketFacts, *, towards_node: bool, time_s: float) -> None:
        """Take in the kernel's statistics of the socket that sends in one direction.

        Args:
            facts: of the socket.
            towards_node: whether it is the broker's socket (True) or the node's own (False).
            time_s: when they were read.
        """
        self.advance(time_s)
        filter = self._filter
        rtt_ms = 1e-3 * facts.min_rtt_us
        if 0 < rtt_ms < 1e3 * _PLAUSIBLE_S:
            # The smallest round trip of the last minutes is a lower bound, and before the first messages an estimate.
            filter.bound(0, least=max(_FLOOR[0], 0.9 * rtt_ms))
            if filter.count < _SEEDED:
                filter.anchor(0, rtt_ms + _RTT_ABOVE_TCP_MS, _RTT_ABOVE_TCP_MS + _RTT_ANCHOR_ERROR * rtt_ms)
        if (self.down_trains if towards_node else self.up_trains).s_per_byte:
            # The kernel keeps the highest rate of short bursts, however old it is: trains are more accurate.
            return
        mbps = 8e-6 * facts.delivery_bytes_per_s
        if not _LEAST_INFORMATIVE_MBPS < mbps < 8 / _FLOOR[1]:
            return
        state = 1 if towards_node else 2
        if facts.app_limited:
            # The sender had no more data to send, so the link is at least this fast.
            filter.bound(state, most=_RATE_BOUND_SLACK * 8 / mbps)
        else:
            filter.anchor(state, 8 / mbps, _RATE_ANCHOR_ERROR * 8 / mbps)

    def predict_s(self, down_bytes: float, up_bytes: float) -> float:
        """Predicted round trip of a work request, in seconds, without the node's own time."""
        return 1e-3 * self._filter.predict(_h(down_bytes, up_bytes, work=True))

    def advance(self, now_s: float) -> None:
        """Let time pass until `now_s`: silence makes the estimate less sure."""
        if self._time_s > -math.inf:
            self._filter.advance(now_s - self._time_s)
        self._time_s = max(self._time_s, now_s)

    @property
    def samples(self) -> int:
        """How many samples the estimate stands on."""
        return self._filter.count

    @property
    def alarms(self) -> int:
        """How often the link was found to have jumped."""
        return self._filter.alarms

    @property
    def rtt_s(self) -> float:
        """Round trip of an empty message."""
        return 1e-3 * self._filter.x[0]

    @property
    def costs_s(self) -> tuple[float, float, float]:
        """Seconds of a request without bytes, per byte to the node, and per byte from it."""
        rtt_ms, down_ms, up_ms, handling_ms = self._filter.x
        return 1e-3 * (rtt_ms + handling_ms), 1e-6 * down_ms, 1e-6 * up_ms

    @property
    def down_s_per_byte(self) -> float:
        """Seconds per byte to the node: 1 / goodput."""
        return 1e-6 * self._filter.x[1]

    @property
    def up_s_per_byte(self) -> float:
        """Seconds per byte from the node: 1 / goodput."""
        return 1e-6 * self._filter.x[2]

    @property
    def noise_s(self) -> float:
        """Jitter: standard deviation of one round trip."""
        return 1e-3 * self._filter.noise

    def relative_std(self) -> tuple[float, float, float]:
        """Relative standard deviations of (rtt, 1/R_down, 1/R_up)."""
        filter = self._filter
        return filter.std(0) / filter.x[0], filter.std(1) / filter.x[1], filter.std(2) / filter.x[2]

    def stale(self, now_s: float) -> bool:
        """Whether the estimate is too old, or based on too few samples, to be trusted."""
        return now_s - self._sampled_s > _SILENCE_S or self.samples < KNOWN_SAMPLES

    def measured_s_per_byte(self, *, down: bool) -> float | None:
        """Seconds per byte to the node or from it; None if that direction was never measured."""
        i = 1 if down else 2
        if self._filter.std(i) > self._filter.x[i] and not (self.down_trains if down else self.up_trains).s_per_byte:
            return None
        return 1e-6 * self._filter.x[i]

    def passed_s_per_byte(self, *, down: bool) -> float:
        """Seconds per byte of the quickest recent message or train in one direction, round trip included.

        The link needs no more than that: delays on the way and on hosts only add to it. Infinite if there is none.
        """
        return self._passed[0 if down else 1].least(self._time_s)

    def unsure_of_rates(self) -> bool:
        """Whether a rate is known too poorly, so that packet trains are worth sending."""
        _, down, up = self.relative_std()
        return max(down, up) > _UNSURE_RATE

    def estimate(self) -> LinkEstimate:
        """The estimate in everyday units."""
        filter = self._filter
        _, down, up = self.relative_std()
        down_mbps, up_mbps = 8 / filter.x[1], 8 / filter.x[2]
        return LinkEstimate(
            time_s=self._sampled_s,
            samples=filter.count,
            rtt_s=self.rtt_s,
            rtt_std_s=1e-3 * filter.std(0),
            down_mbps=down_mbps,
            down_std_mbps=down_mbps * down,
            up_mbps=up_mbps,
            up_std_mbps=up_mbps * up,
            noise_s=self.noise_s,
        )

    def _model_std(self, h: _Vector) -> float:
        x = self._filter.x
        return _TRANSFER_ERROR * (h[1] * x[1] + h[2] * x[2])


def _h(down_bytes: float, up_bytes: float, *, work: bool) -> _Vector:
    return 1.0, down_bytes / 1e3, up_bytes / 1e3, 1.0 if work else 0.0
