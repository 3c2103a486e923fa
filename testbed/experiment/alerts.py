"""What an unattended run should be woken for: conditions that begin and end. Pure: what was seen in, alerts out."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from testbed.experiment.plan import Limits

STATION = "base station"
_COOLER_CELSIUS = 5.0
_RECOVERED = 1.25
"""A limit must be kept with this margin before an alert ends, so that it does not flap."""


class Key(NamedTuple):
    """An alert: what, and of whom."""

    kind: str
    subject: str


class Change(NamedTuple):
    """An alert that begins, or ends."""

    key: Key
    begins: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Seen:
    """One machine now; None for what it does not tell.

    Attributes:
        silent_s: since it was last heard of; 0 for the base station itself.
        gone: why it is offline, empty when it is not.
        rival: another process that wanted the same id.
        throttled: flags of the processor or firmware that are set now, for people.
        clock_ms: against the base station's clock; the base station's own against its steady one.
        clock_error_ms: `clock_ms` is right within this.
    """

    name: str
    silent_s: float = 0.0
    gone: str = ""
    rival: str = ""
    celsius: float | None = None
    throttled: str | None = None
    disk_free_bytes: int | None = None
    clock_ms: float | None = None
    clock_error_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Progress:
    """The runner now.

    Attributes:
        quiet_s: since the last step of the model; None while the plan pauses.
        growth_bytes: of its memory since the end of its first cell; None before.
        broker: what is wrong with it, empty when nothing.
    """

    quiet_s: float | None = None
    growth_bytes: int | None = None
    broker: str = ""


class Alerts:
    """Alerts that are on."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._on: dict[Key, str] = {}

    @property
    def on(self) -> Mapping[Key, str]:
        """Those that have begun and not ended, with their details."""
        return self._on

    def update(self, machines: Iterable[Seen], progress: Progress) -> list[Change]:
        """Take in how things are; what changed by it."""
        now = dict(self._conditions(machines, progress))
        changes = [Change(key, True, detail) for key, detail in now.items() if key not in self._on]
        changes += [Change(key, False, detail) for key, detail in self._on.items() if key not in now]
        self._on = now
        return changes

    def _conditions(self, machines: Iterable[Seen], progress: Progress) -> Iterator[tuple[Key, str]]:
        limits = self._limits
        for machine in machines:
            yield from self._of_machine(machine)
        if progress.broker:
            yield Key("broker_lost", STATION), progress.broker
        if progress.quiet_s is not None and progress.quiet_s > limits.quiet_s:
            yield Key("no_progress", STATION), f"no step of the model for more than {limits.quiet_s:g} s"
        if progress.growth_bytes is not None:
            key = Key("memory_growth", STATION)
            if progress.growth_bytes > self._limit(key, limits.most_growth_mib) * 2**20:
                yield key, f"the runner's memory grew by {progress.growth_bytes >> 20} MiB since its first cell"

    def _of_machine(self, seen: Seen) -> Iterator[tuple[Key, str]]:
        limits = self._limits
        if seen.gone or seen.silent_s > limits.silent_s:
            yield Key("node_lost", seen.name), seen.gone or f"not heard of for more than {limits.silent_s:g} s"
            return  # whatever else it said is old
        if seen.rival:
            yield Key("duplicate_id", seen.name), seen.rival
        if seen.throttled:
            yield Key("throttled", seen.name), seen.throttled
        key = Key("hot", seen.name)
        margin = _COOLER_CELSIUS if key in self._on else 0.0
        if seen.celsius is not None and seen.celsius > limits.most_celsius - margin:
            yield key, f"{seen.celsius:.0f} °C, the limit is {limits.most_celsius:g}"
        key = Key("disk_low", seen.name)
        least_mib = limits.least_disk_mib * (_RECOVERED if key in self._on else 1.0)
        if seen.disk_free_bytes is not None and seen.disk_free_bytes < least_mib * 2**20:
            yield key, f"{seen.disk_free_bytes >> 20} MiB free, the limit is {limits.least_disk_mib:g}"
        key = Key("clock_off", seen.name)
        if seen.clock_ms is not None and abs(seen.clock_ms) - seen.clock_error_ms > self._limit(
            key, limits.most_clock_ms
        ):
            yield key, f"its clock is off by {seen.clock_ms:+.0f} ms (± {seen.clock_error_ms:.0f})"

    def _limit(self, key: Key, most: float) -> float:
        """What may not be exceeded, less by a margin while the alert is on."""
        return most / _RECOVERED if key in self._on else most
