"""Trains: equal messages back to back, whose arrivals tell how fast a link carries bytes (packet-train dispersion).

What lies between two arrivals of a train is one message's time on the slowest link. The round trip is not in it, nor
what hosts spend on every message alike, and jitter only at both ends, however long the train is.

Pure: plans and evaluates, sends nothing.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

GAPS = 4
"""Between the messages that count."""
_LEAST_AIR_S, _MOST_AIR_S = 0.005, 0.012
_NOISES = 6.0
"""The messages that count take this many times the jitter of one, within the limits above."""
_SEGMENT_BYTES, _HEADER_BYTES = 1448, 128
"""Of TCP; and of our frame and MQTT around a payload: so that segments are full."""
_LEAST_SEGMENTS, _MOST_SEGMENTS = 2, 12
"""With less, hosts need longer for a message than a fast link."""
_MOST_MESSAGES = 12
_FIRST_WINDOW_BYTES = 14_000
"""Of a TCP connection that was idle: ten segments; more have to wait for acknowledgements."""
_RECENT, _RECENT_S, _FEW = 15, 8.0, 2
_ODD, _ODD_STDS = 0.15, 1.5
_ALIKE, _CONVINCING = 0.25, 3
_FIRST_STD, _LEAST_STD = 0.3, 0.04
_READ_NS = 200_000
"""Reading what is there already takes less."""
_AWAY_NS = 300_000


@dataclass(frozen=True, slots=True)
class Train:
    """A train to send.

    Attributes:
        message_bytes: payload of each message.
        count: of messages.
        lead: arrivals that don't count: they open the window.
    """

    message_bytes: int
    count: int
    lead: int


def plan_train(s_per_byte: float, rtt_s: float, noise_s: float) -> Train:
    """The shortest train that tells something about a link.

    Args:
        s_per_byte: 1 / goodput, rather too large than too small.
        noise_s: jitter of one message.
    """
    air_s = min(max(_NOISES * noise_s, _LEAST_AIR_S), _MOST_AIR_S)
    segments = min(max(round(air_s / GAPS / s_per_byte / _SEGMENT_BYTES), _LEAST_SEGMENTS), _MOST_SEGMENTS)
    message_bytes = segments * _SEGMENT_BYTES - _HEADER_BYTES
    if (GAPS + 1) * message_bytes <= _FIRST_WINDOW_BYTES:
        return Train(message_bytes, GAPS + 1, 0)
    # As many bytes as are under way at once: then acknowledgements come as fast as the link carries.
    window_bytes = max(_FIRST_WINDOW_BYTES, rtt_s / s_per_byte)
    lead = min(math.ceil(window_bytes / message_bytes), _MOST_MESSAGES - GAPS - 1)
    return Train(message_bytes, lead + GAPS + 1, lead)


def dispersion_s(arrivals: Sequence[tuple[float, bool]], lead: int) -> tuple[int, float] | None:
    """What a train says.

    Args:
        arrivals: when each message arrived, in seconds, and whether that is sure (see `ArrivalTiming`).
        lead: see `Train`.

    Returns:
        How many messages came after the first sure arrival until the last, and what time that took; None if that is
        too little to go by.
    """
    exact = [(i, time_s) for i, (time_s, sure) in enumerate(arrivals) if sure and i >= lead]
    if not exact:
        return None
    (first, first_s), (last, last_s) = exact[0], exact[-1]
    # Nothing in between is looked at: jitter has some arrive together and others late, and whoever leaves out the
    # late ones believes the link to be faster than it is.
    return (last - first, last_s - first_s) if last - first >= GAPS // 2 and last_s > first_s else None


class _TrainRate(NamedTuple):
    time_s: float
    s_per_byte: float


class RateWindow:
    """What the last trains of one direction say.

    On a busy host, or with jitter, single trains are off by any factor, so what counts is their median. Three in a row
    that are odd and agree with each other are a link that has changed: then what came before is forgotten.

    Attributes:
        s_per_byte: 1 / goodput.
        std: relative standard deviation of that.
        noise_s: of one train, between its ends.
    """

    __slots__ = ("_odd_ones", "_trains", "noise_s", "s_per_byte", "std")

    def __init__(self) -> None:
        self._trains: deque[_TrainRate] = deque(maxlen=_RECENT)
        self._odd_ones: list[_TrainRate] = []
        self.s_per_byte = self.noise_s = 0.0
        self.std = 1.0

    @property
    def odd(self) -> bool:
        """Whether the last train differed from those before it."""
        return bool(self._odd_ones)

    def observe(self, time_s: float, took_s: float, n_bytes: int) -> bool:
        """Take in a train; whether the link has changed."""
        train, trains = _TrainRate(time_s, took_s / n_bytes), self._trains
        while trains and time_s - trains[0].time_s > _RECENT_S and len(trains) > _FEW:
            trains.popleft()
        odd = bool(trains) and abs(train.s_per_byte / self.s_per_byte - 1) > max(_ODD, _ODD_STDS * self._spread())
        if not (odd and self._odd_ones and abs(train.s_per_byte / self._odd_ones[-1].s_per_byte - 1) < _ALIKE):
            # Those before were odd by chance.
            trains.extend(self._odd_ones)
            self._odd_ones = []
        (self._odd_ones if odd else trains).append(train)
        changed = len(self._odd_ones) == _CONVINCING
        if changed:
            trains.clear()
            trains.extend(self._odd_ones)
            self._odd_ones = []
        self.s_per_byte = statistics.median(t.s_per_byte for t in trains)
        spread = self._spread()
        # With few values their spread says little.
        self.std = max(_LEAST_STD, 1.25 * max(spread, _FIRST_STD / len(trains)) / math.sqrt(len(trains)))
        self.noise_s = spread * self.s_per_byte * n_bytes
        return changed

    def _spread(self) -> float:
        """Relative standard deviation of one train, from the median deviation."""
        return 1.48 * statistics.median(abs(t.s_per_byte / self.s_per_byte - 1) for t in self._trains)


class ArrivalTiming:
    """Whether messages are read when they arrive, or were there already when somebody came to look.

    Attributes:
        sure: of the last message, that it arrived when it was read.
    """

    __slots__ = ("_last_ns", "sure")

    def __init__(self) -> None:
        self.sure = False
        self._last_ns = 0

    def read(self, asked_ns: int, arrived_ns: int) -> None:
        """Take in one reading.

        Args:
            asked_ns: when somebody began to wait for a message.
            arrived_ns: when it was read.
        """
        waited = arrived_ns - asked_ns >= _READ_NS
        # Who hardly looked away and found one can't be late by more than that, unless the one before was late too.
        self.sure = waited or (self.sure and asked_ns - self._last_ns <= _AWAY_NS)
        self._last_ns = arrived_ns
