"""How much of the links probes may take: exact accounting over a sliding window. Pure.

A probe's air time is its bytes, headers included, times the estimated time per byte of its link and direction when it
is sent. In any window of `WINDOW_S`, the air times of a link's probes add up to at most a share of the window, in each
direction; on a shared channel, those of all links and both directions together do. Shares of air time and of bytes are
the same: in a window, a link carries window / time per byte.
"""

import math
from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple

WINDOW_S = 10.0
IDLE_SHARE, WORKING_SHARE = 0.05, 0.02
"""Of the window, while no work is done, and from the first answer to a request until a window after the last one."""
FIRST_BYTES = 64 << 10
"""Bytes in each direction of a new link that don't count: without a rate their air time is not known."""
UNMEASURED_S_PER_BYTE = 8e-6
"""What is assumed of a direction once these are used up and its rate is still unknown: 1 Mbit/s."""

_NS = 1_000_000_000
_WINDOW_NS = int(WINDOW_S * _NS)
_SHARED = ("", "")
"""The channel of all links together; no node has an empty name."""


class Use(NamedTuple):
    """What a probe needs of one direction of a link.

    Attributes:
        link: name of the node, and of the direction.
        n_bytes: on the way, headers included.
        s_per_byte: estimated time per byte; None if the direction was never measured.
    """

    link: tuple[str, str]
    n_bytes: int
    s_per_byte: float | None


class _Window:
    """Air time on one channel in the last window, in whole ns: sums of floats would drift."""

    __slots__ = ("_sent", "_sum_ns")

    def __init__(self) -> None:
        self._sent: deque[tuple[int, int]] = deque()
        self._sum_ns = 0

    def air_ns(self, now_ns: int) -> int:
        """Of everything sent in the window that ends now, both ends included."""
        while self._sent and now_ns - self._sent[0][0] > _WINDOW_NS:
            self._sum_ns -= self._sent.popleft()[1]
        return self._sum_ns

    def add(self, now_ns: int, air_ns: int) -> None:
        """Take in what is sent now."""
        self._sent.append((now_ns, air_ns))
        self._sum_ns += air_ns


class ProbeBudget:
    """Decides whether a probe may be sent."""

    def __init__(self) -> None:
        """Nothing was sent yet, and no link was measured."""
        self._windows: dict[tuple[str, str], _Window] = {}
        self._first_bytes: dict[tuple[str, str], int] = {}
        self._now_ns = 0
        self._worked_ns = -_WINDOW_NS

    def forget(self) -> None:
        """Take in that all estimates were dropped, so that every link is new again. What was sent still counts."""
        self._first_bytes.clear()

    def worked(self, time_s: float) -> None:
        """Take in that a node answered a request."""
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
        air_ns: Counter[tuple[str, str]] = Counter()
        first_bytes: Counter[tuple[str, str]] = Counter()
        for link, n_bytes, s_per_byte in uses:
            if s_per_byte is None and first_bytes[link] + n_bytes <= self._first_bytes.get(link, FIRST_BYTES):
                first_bytes[link] += n_bytes
            else:
                ns = math.ceil(n_bytes * (UNMEASURED_S_PER_BYTE if s_per_byte is None else s_per_byte) * _NS)
                air_ns[link] += ns
                air_ns[_SHARED] += ns
        most_ns = int(part * self.share(now_ns / _NS) * _WINDOW_NS)
        fits = all(
            self._window(channel).air_ns(now_ns) + ns <= most_ns
            for channel, ns in air_ns.items()
            if shared_air or channel != _SHARED
        )
        if fits or anyway:
            for link, n_bytes in first_bytes.items():
                self._first_bytes[link] = self._first_bytes.get(link, FIRST_BYTES) - n_bytes
            for channel, ns in air_ns.items():
                window = self._window(channel)
                window.air_ns(now_ns)  # drops what is too old, also where it is not asked for
                window.add(now_ns, ns)
        return fits

    def share(self, now_s: float) -> float:
        """Share of the window that probes may take now."""
        return WORKING_SHARE if int(now_s * _NS) - self._worked_ns < _WINDOW_NS else IDLE_SHARE

    def _window(self, channel: tuple[str, str]) -> _Window:
        return self._windows.setdefault(channel, _Window())
