"""How much of the links probes may take: exact accounting over a sliding window. Pure.

A probe's air time is its bytes, headers included, times the time per byte of its link and direction when it is sent.
In any window of `WINDOW_S`, the air times of a link's probes add up to at most a share of the window, in each
direction; on a shared channel, those of all links and both directions together do. Shares of air time and of bytes are
the same: in a window, a link carries window / time per byte.

On a busy host, an estimated rate may be too fast by any factor. So no rate counts that was not seen: the budget takes
the slower one of the estimate and of what has passed. That is never faster than the link, however late messages are.
While tokens flow, bytes are limited as well: 2 % of a fast link are far more than its estimate needs.
"""

import math
from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple

WINDOW_S = 10.0
IDLE_SHARE, WORKING_SHARE = 0.05, 0.02
"""Of the window, while no work is done, and from the first answer to a request until a window after the last one."""
WORKING_BYTES = 400_000
"""The most in each direction of a link and window while tokens flow, even where `WORKING_SHARE` is more. Nine packet
trains at 50 Mbit/s, or four where jitter makes them longer: three of them must agree before a jump is believed."""
FIRST_BYTES = 20 << 10
"""Bytes in each direction of a new link that don't count: without a rate their air time is not known. The shortest
train and some pings."""
UNMEASURED_S_PER_BYTE = 8e-6
"""What a direction is assumed to carry unless its estimate is slower: 1 Mbit/s. Without it, a link through which only
pings have passed would never get a train."""

_NS = 1_000_000_000
_WINDOW_NS = int(WINDOW_S * _NS)
_Channel = tuple[str, str]
_SHARED: _Channel = ("", "")
"""The channel of all links together; no node has an empty name."""


class Use(NamedTuple):
    """What a probe needs of one direction of a link.

    Attributes:
        link: name of the node, and of the direction.
        n_bytes: on the way, headers included.
        s_per_byte: estimated time per byte; None if the direction was never measured.
        passed_s_per_byte: of the quickest recent message, its round trip included; infinite if there is none.
    """

    link: _Channel
    n_bytes: int
    s_per_byte: float | None
    passed_s_per_byte: float = math.inf

    @property
    def air_ns(self) -> int:
        """Time on the air by the slower one of the estimate and of what has passed."""
        s_per_byte = max(self.s_per_byte or 0.0, min(self.passed_s_per_byte, UNMEASURED_S_PER_BYTE))
        return math.ceil(self.n_bytes * s_per_byte * _NS)


class _Window:
    """Sum of what was sent in the last window, in whole numbers: sums of floats would drift."""

    __slots__ = ("_sent", "_sum")

    def __init__(self) -> None:
        self._sent: deque[tuple[int, int]] = deque()
        self._sum = 0

    def sum(self, now_ns: int) -> int:
        """Of everything sent in the window that ends now, both ends included."""
        while self._sent and now_ns - self._sent[0][0] > _WINDOW_NS:
            self._sum -= self._sent.popleft()[1]
        return self._sum

    def add(self, now_ns: int, amount: int) -> None:
        """Take in what is sent now."""
        self.sum(now_ns)  # drops what is too old, also where it is not asked for
        self._sent.append((now_ns, amount))
        self._sum += amount


class ProbeBudget:
    """Decides whether a probe may be sent."""

    def __init__(self) -> None:
        """Nothing was sent yet, and no link was measured."""
        self._air_ns: dict[_Channel, _Window] = {}
        self._working_bytes: dict[_Channel, _Window] = {}
        self._first_bytes: dict[_Channel, int] = {}
        self._counted_ns: dict[_Channel, int] = {}
        self._now_ns = 0
        self._worked_ns = -_WINDOW_NS

    def forget(self) -> None:
        """Take in that all estimates were dropped, so that every link is new again. What was sent still counts."""
        self._first_bytes.clear()

    def worked(self, time_s: float) -> None:
        """Take in that a request was answered."""
        self._worked_ns = max(self._worked_ns, int(time_s * _NS))

    def spend(
        self, uses: Sequence[Use], now_s: float, *, shared_air: bool, part: float = 1.0, anyway: bool = False
    ) -> bool:
        """Count a probe as sent if it fits; returns whether it does.

        Args:
            uses: of each direction.
            now_s: by a steady clock; an earlier time than in the last call counts as that time.
            shared_air: all links share one half-duplex channel.
            part: of the budget that may be in use after this probe.
            anyway: count it even if it does not fit.
        """
        self._now_ns = now_ns = max(self._now_ns, int(now_s * _NS))
        air_ns: Counter[_Channel] = Counter()
        n_bytes: Counter[_Channel] = Counter()
        first_bytes: Counter[_Channel] = Counter()
        for use in uses:
            link = use.link
            if use.s_per_byte is None and first_bytes[link] + use.n_bytes <= self._first_bytes.get(link, FIRST_BYTES):
                first_bytes[link] += use.n_bytes
            else:
                n_bytes[link] += use.n_bytes
                air_ns[link] += use.air_ns
                air_ns[_SHARED] += use.air_ns
        working = now_ns - self._worked_ns < _WINDOW_NS
        most_ns = part * (WORKING_SHARE if working else IDLE_SHARE) * _WINDOW_NS
        fits = all(
            _window(self._air_ns, channel).sum(now_ns) + ns <= most_ns
            for channel, ns in air_ns.items()
            if shared_air or channel != _SHARED
        )
        if working:
            fits = fits and all(
                _window(self._working_bytes, link).sum(now_ns) + n <= part * WORKING_BYTES
                for link, n in n_bytes.items()
            )
        if fits or anyway:
            for link, n in first_bytes.items():
                self._first_bytes[link] = self._first_bytes.get(link, FIRST_BYTES) - n
            for channel, ns in air_ns.items():
                _window(self._air_ns, channel).add(now_ns, ns)
            self._counted_ns |= air_ns
            if working:
                for link, n in n_bytes.items():
                    _window(self._working_bytes, link).add(now_ns, n)
        return fits

    def took(self, link: _Channel, seconds: float) -> None:
        """Take in that the last train of a link and direction took longer than counted: the link has become slower."""
        counted_ns = self._counted_ns.pop(link, None)
        if counted_ns is not None and (more_ns := math.ceil(seconds * _NS) - counted_ns) > 0:
            for channel in (link, _SHARED):
                _window(self._air_ns, channel).add(self._now_ns, more_ns)


def _window(windows: dict[_Channel, _Window], channel: _Channel) -> _Window:
    return windows.setdefault(channel, _Window())
