"""One node's link, estimated from what it did to our messages.

A message of `down` bytes to a node and its answer of `up` bytes take, less the node's own time,
`rtt + down / R_down + up / R_up`, and for work `handling` more: what both sides spend around a request without
accounting for it, such as waking up. The state (rtt, 1/R_down, 1/R_up, handling) is tracked by a robust Kalman
filter. As long as all messages have one size the four can't be told apart. Trains of pings (`links.train`) tell the
rates, and before them the kernel's account of the sockets (`anchor`); empty pings tell the handling. Everything is in
payload bytes, so rates are goodput.

Pure: time comes with the samples, so that recorded traces can be replayed.
"""

import math
from dataclasses import dataclass

from bs_coordinator.links.kalman import RobustFilter
from bs_coordinator.links.packet_train import RateWindow
from wire.status import SocketFacts

_Vector = tuple[float, float, float, float]

# The filter's units are ms and ms per 1000 bytes, so that all states are about 1: 8 Mbit/s is 1 ms per 1000 bytes.
_PRIOR = (5.0, 0.16, 0.16, 0.2)
_PRIOR_STD = (20.0, 0.5, 0.5, 0.5)
_FLOOR = (0.01, 8e-5, 8e-5, 1e-3)
_DRIFT = (0.02, 0.02, 0.02, 0.05)
_FIRST_NOISE = 0.3
_LEAST_NOISE = 0.02
_TRANSFER_ERROR = 0.06
"""Relative error of the linear model for large messages: slow start, pacing, acknowledgements on shared air."""
KNOWN_SAMPLES = 3
"""With fewer a link is too little known."""
_SILENCE_S = 15.0
_UNSURE_RATE = 0.12
_PLAUSIBLE_S = 600.0

_RTT_ABOVE_TCP_MS = 0.4
"""What broker and clients add to the kernel's smallest round trip; the anchor allows as much again either way."""
_RTT_ANCHOR_ERROR = 0.25
_SEEDED = 3
_RATE_ANCHOR_ERROR = 0.25
_RATE_BOUND_SLACK = 1.3
"""The kernel's rate of a short burst may lie above what the link sustains."""
_LEAST_INFORMATIVE_MBPS = 0.1


@dataclass(frozen=True, slots=True)
class LinkSample:
    """One message there and its answer back, or what came between the answers to a train of pings.

    Attributes:
        time_s: when the answer arrived, by any clock that only grows.
        down_bytes: frame towards the node.
        up_bytes: frame from the node.
        round_trip_s: by the base station's clock; of a train, from its first counted arrival to the last.
        node_s: the node's own account of its time, to be taken off.
        experts, rows: distinct experts and hidden states of a request; 0 for probes.
        contention_s: time it presumably waited for other nodes' frames, on shared air or on machines that all of
            them pass, to be taken off too.
        load_s: the part of `node_s` that went into reading experts into memory.
        queued: the node had other requests to answer first, so that the round trip says little about the link.
        train: the round trip is not in it (see `links.train`).
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

    @property
    def network_s(self) -> float:
        """Time on the link, in the broker and in both MQTT clients."""
        return self.round_trip_s - self.node_s - self.contention_s


@dataclass(frozen=True, slots=True)
class LinkEstimate:
    """What is believed of a link.

    Attributes:
        time_s: of the newest sample.
        samples: taken in so far.
        rtt_s: round trip of an empty message.
        down_mbps: goodput towards the node, 10⁶ bit/s.
        up_mbps: goodput from the node.
        rtt_std_s, down_std_mbps, up_std_mbps: one standard deviation.
        noise_s: of one round trip, one standard deviation (jitter).
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


class LinkEstimator:
    """The estimate of one link.

    Attributes:
        rejected: samples that can't be true (negative, not finite), taken in by no one.
        down_trains, up_trains: what trains say of each direction.
    """

    __slots__ = ("_filter", "_sampled_s", "_time_s", "down_trains", "rejected", "up_trains")

    def __init__(self) -> None:
        self.rejected = 0
        self.down_trains, self.up_trains = RateWindow(), RateWindow()
        self._time_s = self._sampled_s = -math.inf
        self._filter = RobustFilter(
            _PRIOR, _PRIOR_STD, drift=_DRIFT, floor=_FLOOR, noise=_FIRST_NOISE, least_noise=_LEAST_NOISE
        )

    def observe(self, sample: LinkSample) -> bool:
        """Take in a sample; False if it can't be true."""
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
        if sample.train:
            return self._observe_train(sample)
        h = _h(sample.down_bytes, sample.up_bytes, work=sample.rows > 0)
        z = 1e3 * network_s
        filter = self._filter
        if filter.count == 0:
            filter.noise = max(_FIRST_NOISE, 0.1 * z)
        # How long others' frames were in the way is itself a guess.
        filter.update(h, z, extra_std=self._model_std(h) + 0.5e3 * sample.contention_s)
        return True

    def _observe_train(self, sample: LinkSample) -> bool:
        down = sample.down_bytes > 0
        n_bytes = sample.down_bytes or sample.up_bytes
        if not n_bytes:
            self.rejected += 1
            return False
        rate = self.down_trains if down else self.up_trains
        if rate.observe(sample.time_s, sample.network_s, n_bytes):
            self._filter.alarm()
        ms = 1e6 * rate.s_per_byte
        self._filter.replace(1 if down else 2, ms, rate.std * ms)
        return True

    def anchor(self, facts: SocketFacts, *, towards_node: bool, time_s: float) -> None:
        """Take in the kernel's account of the socket that sends in one direction.

        Args:
            towards_node: the broker's socket (True) or the node's own (False).
        """
        self.advance(time_s)
        filter = self._filter
        rtt_ms = 1e-3 * facts.min_rtt_us
        if 0 < rtt_ms < 1e3 * _PLAUSIBLE_S:
            # The smallest of the last minutes: a bound, and only before the first messages more than that.
            filter.bound(0, least=max(_FLOOR[0], 0.9 * rtt_ms))
            if filter.count < _SEEDED:
                filter.anchor(0, rtt_ms + _RTT_ABOVE_TCP_MS, _RTT_ABOVE_TCP_MS + _RTT_ANCHOR_ERROR * rtt_ms)
        if (self.down_trains if towards_node else self.up_trains).s_per_byte:
            # The kernel keeps the highest rate of short bursts, however long ago that was: trains know better.
            return
        mbps = 8e-6 * facts.delivery_bytes_per_s
        if not _LEAST_INFORMATIVE_MBPS < mbps < 8 / _FLOOR[1]:
            return
        state = 1 if towards_node else 2
        if facts.app_limited:
            # The sender had nothing more to send: the link is at least this fast.
            filter.bound(state, most=_RATE_BOUND_SLACK * 8 / mbps)
        else:
            filter.anchor(state, 8 / mbps, _RATE_ANCHOR_ERROR * 8 / mbps)

    def predict_s(self, down_bytes: float, up_bytes: float) -> tuple[float, float]:
        """Mean and standard deviation of a work message's round trip, without the node's own time."""
        h = _h(down_bytes, up_bytes, work=True)
        mean, var = self._filter.predict(h)
        return 1e-3 * mean, 1e-3 * math.sqrt(var + self._filter.noise**2 + self._model_std(h) ** 2)

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
        """Of a request: without bytes, per byte towards the node, per byte from it."""
        rtt_ms, down_ms, up_ms, handling_ms = self._filter.x
        return 1e-3 * (rtt_ms + handling_ms), 1e-6 * down_ms, 1e-6 * up_ms

    @property
    def down_s_per_byte(self) -> float:
        """1 / goodput towards the node."""
        return 1e-6 * self._filter.x[1]

    @property
    def up_s_per_byte(self) -> float:
        """1 / goodput from the node."""
        return 1e-6 * self._filter.x[2]

    @property
    def down_mbps(self) -> float:
        """Goodput towards the node, 10⁶ bit/s."""
        return 8 / self._filter.x[1]

    @property
    def up_mbps(self) -> float:
        """Goodput from the node, 10⁶ bit/s."""
        return 8 / self._filter.x[2]

    @property
    def noise_s(self) -> float:
        """Jitter of one round trip, one standard deviation."""
        return 1e-3 * self._filter.noise

    def relative_std(self) -> tuple[float, float, float]:
        """Relative standard deviations of (rtt, 1/R_down, 1/R_up)."""
        filter = self._filter
        return filter.std(0) / filter.x[0], filter.std(1) / filter.x[1], filter.std(2) / filter.x[2]

    def stale(self, now_s: float) -> bool:
        """Whether the estimate should be renewed before it is trusted."""
        return now_s - self._sampled_s > _SILENCE_S or self.samples < KNOWN_SAMPLES

    def unsure_of_rates(self) -> bool:
        """Whether messages of other sizes would tell what is not known yet."""
        _, down, up = self.relative_std()
        return max(down, up) > _UNSURE_RATE

    def estimate(self) -> LinkEstimate:
        """The state in people's units."""
        filter = self._filter
        _, down, up = self.relative_std()
        return LinkEstimate(
            time_s=self._sampled_s,
            samples=filter.count,
            rtt_s=self.rtt_s,
            rtt_std_s=1e-3 * filter.std(0),
            down_mbps=self.down_mbps,
            down_std_mbps=self.down_mbps * down,
            up_mbps=self.up_mbps,
            up_std_mbps=self.up_mbps * up,
            noise_s=self.noise_s,
        )

    def _model_std(self, h: _Vector) -> float:
        x = self._filter.x
        return _TRANSFER_ERROR * (h[1] * x[1] + h[2] * x[2])


def _h(down_bytes: float, up_bytes: float, *, work: bool) -> _Vector:
    return 1.0, down_bytes / 1e3, up_bytes / 1e3, 1.0 if work else 0.0
