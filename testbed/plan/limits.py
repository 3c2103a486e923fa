"""Limits of an experiment, and the rules that preflight and the alerts of a run share. Pure."""

from typing import Annotated

from msgspec import Meta, Struct

Seconds = Annotated[float, Meta(gt=0, le=1e7)]
_COOLER_CELSIUS = 5.0
_RECOVERED = 1.25
"""An alert ends only when its limit is kept by this factor (5 °C for heat), so that it doesn't flap."""


class RunLimits(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Outside these limits preflight fails and a run raises an alert.

    Attributes:
        least_mbps: lowest goodput of a node's link in either direction, Mbit/s.
        most_clock_ms: largest difference of a node's clock from the base station's, and of the base station's wall
            clock from its steady clock.
        least_disk_mib: free disk space on the base station and on nodes.
        most_celsius: processor temperature.
        most_growth_mib: growth of the runner's memory since the end of its first cell.
        silent_s: a node that sends nothing for this long is lost; nodes send a heartbeat every three seconds.
        quiet_s: longest time without a step of the model.
    """

    least_mbps: Annotated[float, Meta(ge=0, le=1e9)] = 5.0
    most_clock_ms: Annotated[float, Meta(gt=0, le=1e9)] = 500.0
    least_disk_mib: Annotated[float, Meta(ge=0, le=1e9)] = 512.0
    most_celsius: Annotated[float, Meta(ge=0, le=200)] = 80.0
    most_growth_mib: Annotated[float, Meta(gt=0, le=1e9)] = 1024.0
    silent_s: Seconds = 12.0
    quiet_s: Seconds = 600.0

    # Each rule returns why its limit is broken, or an empty text. `raised` says that an alert is on already: the
    # limit must then be kept with a margin before the rule is satisfied again.

    def heat(self, celsius: float, *, raised: bool = False) -> str:
        """Why a processor is too hot; empty if it isn't."""
        limit = self.most_celsius - (_COOLER_CELSIUS if raised else 0.0)
        return f"{celsius:.0f} °C, the limit is {self.most_celsius:g}" if celsius > limit else ""

    def disk(self, free_bytes: int, *, raised: bool = False) -> str:
        """Why the free disk space is too little; empty if it isn't."""
        least_mib = self.least_disk_mib * (_RECOVERED if raised else 1.0)
        too_little = free_bytes < least_mib * 2**20
        return f"{free_bytes >> 20} MiB free, the limit is {self.least_disk_mib:g}" if too_little else ""

    def clock(self, offset_ms: float, error_ms: float, *, raised: bool = False) -> str:
        """Why a clock is wrong; empty if it may be right.

        Args:
            offset_ms: estimated offset from the reference clock.
            error_ms: largest possible error of that estimate.
        """
        wrong = abs(offset_ms) - error_ms > self._ceiling(self.most_clock_ms, raised)
        return f"the clock is off by {offset_ms:+.0f} ms (± {error_ms:.0f})" if wrong else ""

    def memory_growth(self, growth_bytes: int, *, raised: bool = False) -> str:
        """Why the runner has grown too much; empty if it hasn't."""
        grown = growth_bytes > self._ceiling(self.most_growth_mib, raised) * 2**20
        return f"the runner's memory grew by {growth_bytes >> 20} MiB since its first cell" if grown else ""

    def _ceiling(self, most: float, raised: bool) -> float:
        return most / _RECOVERED if raised else most
