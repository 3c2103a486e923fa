"""Packet trains: equal messages sent back to back, whose arrival times show the rate of a link.

The gap between two arrivals of a train is one message's time on the slowest link (packet-train dispersion: Dovrolis,
Ramanathan and Moore, "Packet-Dispersion Techniques and a Capacity-Estimation Methodology", IEEE/ACM Trans. Networking,
2004). It contains neither the round trip nor what hosts spend equally on every message, and jitter affects only the
train's two ends, however long it is.

Pure: plans and evaluates trains, but sends nothing.
"""

import bisect
import itertools
import math
import statistics
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

GAPS = 4
"""Gaps between the messages that count."""
_MIN_AIR_S, _MAX_AIR_S = 0.004, 0.012
_JITTERS = 4.0
"""The messages that count take this many times the jitter of one message, within the limits above."""
_SEGMENT_BYTES, _HEADER_BYTES = 1448, 128
"""Payload of a TCP segment, and our frame's and MQTT's headers, so that messages fill their segments."""
_MIN_SEGMENTS, _MAX_SEGMENTS = 2, 12
"""With smaller messages, hosts take longer per message than a fast link does."""
_MAX_MESSAGES = 12
_FIRST_WINDOW_BYTES = 10 * _SEGMENT_BYTES
"""Initial window of an idle TCP connection (RFC 6928): more bytes must wait for acknowledgements."""
_TWO_WINDOWS_BYTES = 3 * _FIRST_WINDOW_BYTES
"""This window and the next, which is twice as large."""
_HELD_UP, _HANDLING_S = 8.0, 5e-4
"""A train was held up if it took longer than its round trips, this many times its bytes at the rate that its spacing
shows, and this long for hosts to handle its messages."""
_WINDOW_TRAINS, _WINDOW_S, _MIN_TRAINS = 15, 20.0, 3
"""A rate is the median of this many trains, not older than this unless fewer than the last number would remain."""
_ODD, _ODD_STDS = 0.15, 2.0
"""A train is odd if its time differs by more than this share, and by this many standard deviations."""
_ALIKE, _CONVINCING = 0.25, 3
"""This many odd trains in a row whose rates differ by less than this share mean that the link has changed."""
_FIRST_NOISE_S, _FIRST_NOISE, _MIN_STD = 1e-3, 0.3, 0.04
"""Noise of a direction's first train, before others show more or less: so many seconds, or this share of its time. And
the least relative error of a rate."""
_WAITED_NS = 200_000
"""Reading a message that is already there takes less than this."""
_ACCURATE_NS = 300_000


@dataclass(frozen=True, slots=True)
class PacketTrain:
    """A train to send.

    Attributes:
        message_bytes: payload of each message.
        count: number of messages.
        lead: number of first arrivals that do not count: they open the TCP window.
    """

    message_bytes: int
    count: int
    lead: int


SHORTEST = PacketTrain(_MIN_SEGMENTS * _SEGMENT_BYTES - _HEADER_BYTES, GAPS + 1, 0)


def plan_train(s_per_byte: float, rtt_s: float, noise_s: float) -> PacketTrain:
    """The shortest train that measures a link's rate.

    Args:
        s_per_byte: 1 / goodput; if uncertain, rather too large than too small.
        rtt_s: round trip of an empty message.
        noise_s: jitter of one message.
    """
    air_s = min(max(_JITTERS * noise_s, _MIN_AIR_S), _MAX_AIR_S)
    segments = min(max(round(air_s / GAPS / s_per_byte / _SEGMENT_BYTES), _MIN_SEGMENTS), _MAX_SEGMENTS)
    size, message_bytes = segments * _SEGMENT_BYTES, segments * _SEGMENT_BYTES - _HEADER_BYTES
    if (GAPS + 1) * size <= _FIRST_WINDOW_BYTES:
        return PacketTrain(message_bytes, GAPS + 1, 0)
    # The lead fills the first window. The next one comes in a single burst.
    lead = _FIRST_WINDOW_BYTES // size
    if (lead + GAPS + 1) * size > _TWO_WINDOWS_BYTES:
        # Lead with as many bytes as the link holds in flight: from then on acknowledgements arrive at the link's rate.
        lead = math.ceil(max(_FIRST_WINDOW_BYTES, rtt_s / s_per_byte) / message_bytes)
    lead = min(lead, _MAX_MESSAGES - GAPS - 1)
    return PacketTrain(message_bytes, lead + GAPS + 1, lead)


def dispersion_s(arrivals: Sequence[tuple[float, bool]], lead: int) -> tuple[int, float] | None:
    """The time that a train's messages took on the slowest link.

    Args:
        arrivals: of each message, when it arrived, in seconds, and whether that time is accurate (`ArrivalTiming`).
        lead: number of first arrivals that do not count.

    Returns:
        The number of messages from the first accurate arrival (exclusive) to the last accurate one, and the time
        between these arrivals in seconds; None if there are too few.
    """
    exact = [(i, time_s) for i, (time_s, accurate) in enumerate(arrivals) if accurate and i >= lead]
    if not exact:
        return None
    (first, first_s), (last, last_s) = exact[0], exact[-1]
    # Arrivals in between are ignored: jitter makes some of them late, and dropping only the late ones would make the
    # link appear faster than it is.
    return (last - first, last_s - first_s) if last - first >= GAPS // 2 and last_s > first_s else None


def held_up(train_s: float, n_bytes: int, s_per_byte: float, least_rtt_s: float) -> bool:
    """Whether a host held a train up on its way, so that its messages arrived together and their spacing says nothing.

    Args:
        train_s: from the sending of its first message to the arrival of the last.
        n_bytes: of all its messages.
        s_per_byte: by its spacing.
        least_rtt_s: the quickest recent round trip.
    """
    round_trips = math.ceil(math.log2(1 + n_bytes / _FIRST_WINDOW_BYTES))
    return train_s > round_trips * least_rtt_s + _HELD_UP * n_bytes * s_per_byte + _HANDLING_S


class _Train(NamedTuple):
    time_s: float
    took_s: float
    n_bytes: int

    @property
    def s_per_byte(self) -> float:
        return self.took_s / self.n_bytes


class RateWindow:
    """The rate of one direction by its last trains.

    On a busy host, or with jitter, the time of a single train is off by any amount, which matters less for longer
    trains. So their median counts, weighted by bytes. Three odd trains in a row that agree with each other mean that
    the link has changed, and earlier ones are dropped.

    Attributes:
        s_per_byte: 1 / goodput; 0 before the first train.
        std: relative standard deviation of that.
        noise_s: jitter of one train, between its ends.
        held_up: trains since the last usable one that hosts held up.
    """

    __slots__ = ("_odd_ones", "_trains", "held_up", "noise_s", "s_per_byte", "std")

    def __init__(self) -> None:
        self._trains: deque[_Train] = deque(maxlen=_WINDOW_TRAINS)
        self._odd_ones: list[_Train] = []
        self.s_per_byte = self.noise_s = 0.0
        self.std = 1.0
        self.held_up = 0

    @property
    def odd(self) -> bool:
        """Whether the last train differed from those before it."""
        return bool(self._odd_ones)

    @property
    def recent(self) -> int:
        """How many trains the rate stands on."""
        return len(self._trains)

    def observe(self, time_s: float, took_s: float, n_bytes: int) -> bool:
        """Take in a train; returns whether the link has changed.

        Args:
            time_s: when its last message arrived.
            took_s: time between its ends.
            n_bytes: that arrived in this time.
        """
        self.held_up = 0
        train, trains = _Train(time_s, took_s, n_bytes), self._trains
        while trains and time_s - trains[0].time_s > _WINDOW_S and len(trains) > _MIN_TRAINS:
            trains.popleft()
        odd = self._is_odd(train)
        if not (odd and self._odd_ones and abs(train.s_per_byte / self._odd_ones[-1].s_per_byte - 1) < _ALIKE):
            # Earlier odd trains were odd by chance.
            trains.extend(self._odd_ones)
            self._odd_ones = []
        (self._odd_ones if odd else trains).append(train)
        changed = len(self._odd_ones) == _CONVINCING
        if changed:
            trains.clear()
            trains.extend(self._odd_ones)
            self._odd_ones = []
        self.s_per_byte = _median_s_per_byte(trains)
        self.noise_s = 1.48 * statistics.median(abs(t.took_s - self.s_per_byte * t.n_bytes) for t in trains)
        # 1.25 σ/√n is the standard error of a median; a train says as much as its bytes squared.
        certain_s = self.s_per_byte * math.sqrt(sum(t.n_bytes**2 for t in trains))
        self.std = max(_MIN_STD, 1.25 * self._train_noise_s() / certain_s)
        return changed

    def _is_odd(self, train: _Train) -> bool:
        if len(self._trains) < _CONVINCING:
            return False  # Nothing is known well enough yet.
        expected_s = self.s_per_byte * train.n_bytes
        return abs(train.took_s - expected_s) > max(_ODD * expected_s, _ODD_STDS * self._train_noise_s())

    def _train_noise_s(self) -> float:
        """Of one train. The spread of few trains says little about it."""
        first_s = max(_FIRST_NOISE_S, _FIRST_NOISE * max(train.took_s for train in self._trains))
        return max(self.noise_s, first_s / len(self._trains))


def _median_s_per_byte(trains: Collection[_Train]) -> float:
    """The median, weighted by bytes."""
    ordered = sorted(trains, key=lambda train: train.s_per_byte)
    passed = list(itertools.accumulate(train.n_bytes for train in ordered))
    half = passed[-1] / 2
    lower, upper = ordered[bisect.bisect_left(passed, half)], ordered[bisect.bisect_right(passed, half)]
    return (lower.s_per_byte + upper.s_per_byte) / 2


class ArrivalTiming:
    """Tells whether a message was read when it arrived, or had been waiting in a buffer.

    Attributes:
        sure: whether the last message's time of reading is accurate as its time of arrival.
    """

    __slots__ = ("_last_ns", "sure")

    def __init__(self) -> None:
        self.sure = False
        self._last_ns = 0

    def read(self, asked_ns: int, arrived_ns: int) -> None:
        """Take in one reading.

        Args:
            asked_ns: when polling for the message began.
            arrived_ns: when it was read.
        """
        waited = arrived_ns - asked_ns >= _WAITED_NS
        # If we polled within 300 µs of the last read, the timestamp is accurate, unless the last one was not.
        self.sure = waited or (self.sure and asked_ns - self._last_ns <= _ACCURATE_NS)
        self._last_ns = arrived_ns
