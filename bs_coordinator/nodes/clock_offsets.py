"""Offsets of the nodes' clocks from the base station's: four timestamps per probe, bounds that hold for any delays.

Let t1 be when a probe left here, t2 when it arrived and t3 when its answer left there, by the node's clock, and t4
when that arrived here. With the node's offset θ (its clock minus ours) and the two delays, t2 = t1 + down + θ and
t4 = t3 + up − θ. No delay is negative, so t3 − t4 ≤ θ ≤ t2 − t1. This range is as wide as the round trip, and it is
all that can be known without assuming that both directions take equally long. Its middle, NTP's estimate (RFC 5905),
does assume that. Because a clock's drift is limited, probes at other times narrow the range. Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np

MAX_DRIFT_PPM = 500.0
"""Largest rate error of a Linux clock (ntp_adjtime); a clock beyond it was set or is being slewed."""
_BINS = 32
_MIN_SPAN_NS = 5_000_000_000
"""Over a shorter time, jitter exceeds any drift."""
_PPM = 1e-6


class ClockSample(NamedTuple):
    """One probe of a node's clock; times in nanoseconds since 1970.

    Attributes:
        node: name of the node.
        sent_unix_ns, arrived_unix_ns: by the base station's clock (t1, t4).
        node_arrived_unix_ns, node_left_unix_ns: by the node's clock (t2, t3).
    """

    node: str
    sent_unix_ns: int
    node_arrived_unix_ns: int
    node_left_unix_ns: int
    arrived_unix_ns: int

    @property
    def low_ns(self) -> int:
        """Lower bound of the offset: the node's clock is at least this far ahead."""
        return self.node_left_unix_ns - self.arrived_unix_ns

    @property
    def high_ns(self) -> int:
        """Upper bound of the offset: the node's clock is at most this far ahead."""
        return self.node_arrived_unix_ns - self.sent_unix_ns

    @property
    def delay_ns(self) -> int:
        """Delay of both directions together, without the node's own time."""
        return self.high_ns - self.low_ns

    @property
    def middle_ns(self) -> float:
        """The offset if both directions took equally long."""
        return (self.low_ns + self.high_ns) / 2

    @property
    def at_unix_ns(self) -> int:
        """The time that the sample stands for, by the base station's clock."""
        return (self.sent_unix_ns + self.arrived_unix_ns) // 2

    @property
    def slack_ns(self) -> float:
        """Largest drift between `at_unix_ns` and the times within the probe at which its bounds hold."""
        return MAX_DRIFT_PPM * _PPM * (self.arrived_unix_ns - self.sent_unix_ns) / 2


class OneWay(NamedTuple):
    """Estimated delays of one probe by direction. They rest on the offset; their error is at most `error_ns`."""

    down_ns: float
    up_ns: float
    error_ns: float


@dataclass(frozen=True, slots=True)
class Offset:
    """The offset of a node's clock at one time.

    Attributes:
        offset_ns: the estimate; positive if the node's clock is ahead.
        low_ns, high_ns: bounds of the offset.
    """

    offset_ns: float
    low_ns: float
    high_ns: float

    @property
    def error_ns(self) -> float:
        """Largest possible error of the estimate."""
        return max(self.high_ns - self.offset_ns, self.offset_ns - self.low_ns)


class NodeClock:
    """One node's clock, estimated from its probes.

    Attributes:
        samples: number of probes.
        drift_ppm: how much faster the node's clock runs, in µs per second; None if the probes span less than 5 s.
        drift_low_ppm, drift_high_ppm: bounds of the drift if the rate was constant; None if the probes span less than
            5 s, or if no constant rate fits them.
        steady: whether a constant rate of at most `MAX_DRIFT_PPM` explains all probes; if not, the clock was set.
    """

    def __init__(self, samples: Sequence[ClockSample]) -> None:
        """Fit a line through the fastest probe of each interval: fast probes leave little room for asymmetry.

        Args:
            samples: at least one, all of the same node.
        """
        ordered = sorted(samples, key=lambda sample: sample.at_unix_ns)
        self.samples = len(ordered)
        self._origin_ns = ordered[0].at_unix_ns
        self._at = np.array([sample.at_unix_ns - self._origin_ns for sample in ordered], np.float64)
        self._low = np.array([sample.low_ns - sample.slack_ns for sample in ordered])
        self._high = np.array([sample.high_ns + sample.slack_ns for sample in ordered])
        best = _fastest(ordered)
        self._line = _fit(best, self._origin_ns)
        self.drift_ppm = self.drift_low_ppm = self.drift_high_ppm = None
        self.steady = True
        if len(best) > 1 and best[-1].at_unix_ns - best[0].at_unix_ns >= _MIN_SPAN_NS:
            low, high = _drift_range(best)
            self.steady = low <= high
            middle = self._line[1] / _PPM
            self.drift_ppm = min(max(middle, low), high) if self.steady else middle
            self.drift_low_ppm, self.drift_high_ppm = (low, high) if self.steady else (None, None)
        self.steady = self.steady and all(self._range(at)[2] for at in self._at)

    def at(self, unix_ns: int) -> Offset:
        """The offset at a time of the base station's clock."""
        at = unix_ns - self._origin_ns
        low, high, _ = self._range(at)
        estimate = self._line[0] + self._line[1] * at
        return Offset(min(max(estimate, low), high), low, high)

    def one_way(self, sample: ClockSample) -> OneWay:
        """The delays of one probe by direction."""
        offset = self.at(sample.at_unix_ns)
        return OneWay(sample.high_ns - offset.offset_ns, offset.offset_ns - sample.low_ns, offset.error_ns)

    def _range(self, at: float) -> tuple[float, float, bool]:
        """Bounds of the offset, and whether all probes agree on them; if not, the bounds of the nearest probe."""
        widened = MAX_DRIFT_PPM * _PPM * np.abs(self._at - at)
        low, high = float(np.max(self._low - widened)), float(np.min(self._high + widened))
        if low <= high:
            return low, high, True
        nearest = int(np.argmin(np.abs(self._at - at)))
        return float(self._low[nearest] - widened[nearest]), float(self._high[nearest] + widened[nearest]), False


def _fastest(ordered: Sequence[ClockSample]) -> list[ClockSample]:
    """The fastest probe of each of up to `_BINS` equal intervals."""
    first, last = ordered[0].at_unix_ns, ordered[-1].at_unix_ns
    width = max((last - first) / _BINS, 1.0)
    best: dict[int, ClockSample] = {}
    for sample in ordered:
        bin = int((sample.at_unix_ns - first) // width)
        if bin not in best or sample.delay_ns < best[bin].delay_ns:
            best[bin] = sample
    return list(best.values())


def _fit(best: Sequence[ClockSample], origin_ns: int) -> tuple[float, float]:
    """Offset at the origin and slope, by least squares with weights 1 / delay²; no slope for a short span."""
    at = np.array([sample.at_unix_ns - origin_ns for sample in best], np.float64)
    middle = np.array([sample.middle_ns for sample in best])
    weight = 1.0 / np.maximum([float(sample.delay_ns) for sample in best], 1e3) ** 2
    mean_at = float(np.average(at, weights=weight))
    mean = float(np.average(middle, weights=weight))
    spread = float(np.sum(weight * (at - mean_at) ** 2))
    if spread == 0.0 or at[-1] - at[0] < _MIN_SPAN_NS:
        return mean, 0.0
    slope = float(np.sum(weight * (at - mean_at) * (middle - mean))) / spread
    slope = min(max(slope, -MAX_DRIFT_PPM * _PPM), MAX_DRIFT_PPM * _PPM)
    return mean - slope * mean_at, slope


def _drift_range(best: Sequence[ClockSample]) -> tuple[float, float]:
    """Bounds of the drift in ppm: between any two probes, a line can rise only by what their bounds allow."""
    low, high = -MAX_DRIFT_PPM, MAX_DRIFT_PPM
    for a, b in combinations(best, 2):
        span = (b.at_unix_ns - a.at_unix_ns) * _PPM
        slack_ns = a.slack_ns + b.slack_ns
        low = max(low, (b.low_ns - a.high_ns - slack_ns) / span)
        high = min(high, (b.high_ns - a.low_ns + slack_ns) / span)
    return low, high
