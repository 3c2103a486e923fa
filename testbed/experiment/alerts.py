"""Alerts of a run: conditions that begin and end. Pure: observations in, changes of alerts out."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from testbed.plan.limits import RunLimits

BASE_STATION = "base station"


class Key(NamedTuple):
    """Identifies an alert: its kind, and the machine it is about."""

    kind: str
    subject: str


class Change(NamedTuple):
    """An alert that begins or ends."""

    key: Key
    begins: bool
    detail: str


@dataclass(frozen=True, slots=True)
class MachineState:
    """What is known about one machine now; None for what it doesn't report.

    Attributes:
        silent_s: time since its last message; 0 for the base station itself.
        gone: why it is offline; empty if it is online.
        rival: another process that tried to use the same node id.
        throttled: flags of the processor or firmware that are set now, in words.
        clock_ms: its clock minus the base station's; for the base station, wall clock against steady clock.
        clock_error_ms: largest possible error of `clock_ms`.
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
class RunnerState:
    """The state of the runner now.

    Attributes:
        quiet_s: time since the model's last step; None while none is expected.
        growth_bytes: growth of its memory since the end of its first cell; None before.
        broker: what is wrong with the connection to the broker; empty if nothing is.
    """

    quiet_s: float | None = None
    growth_bytes: int | None = None
    broker: str = ""


class Alerts:
    """The alerts that are on."""

    def __init__(self, limits: RunLimits) -> None:
        self._limits = limits
        self._on: dict[Key, str] = {}

    @property
    def on(self) -> Mapping[Key, str]:
        """Details of the alerts that have begun and not ended."""
        return self._on

    def update(self, machines: Iterable[MachineState], runner: RunnerState) -> list[Change]:
        """Take in the present state; returns the alerts that begin or end with it."""
        now = {key: detail for key, detail in self._conditions(machines, runner) if detail}
        changes = [Change(key, True, detail) for key, detail in now.items() if key not in self._on]
        changes += [Change(key, False, detail) for key, detail in self._on.items() if key not in now]
        self._on = now
        return changes

    def _conditions(self, machines: Iterable[MachineState], runner: RunnerState) -> Iterator[tuple[Key, str]]:
        limits = self._limits
        for machine in machines:
            yield from self._of_machine(machine)
        yield Key("broker_lost", BASE_STATION), runner.broker
        if runner.quiet_s is not None and runner.quiet_s > limits.quiet_s:
            yield Key("no_progress", BASE_STATION), f"no step of the model for more than {limits.quiet_s:g} s"
        if runner.growth_bytes is not None:
            key = Key("memory_growth", BASE_STATION)
            yield key, limits.memory_growth(runner.growth_bytes, raised=key in self._on)

    def _of_machine(self, machine: MachineState) -> Iterator[tuple[Key, str]]:
        limits = self._limits
        if machine.gone or machine.silent_s > limits.silent_s:
            reason = machine.gone or f"no message for more than {limits.silent_s:g} s"
            yield Key("node_lost", machine.name), reason
            return  # the rest of what is known about it is out of date
        yield Key("duplicate_id", machine.name), machine.rival
        yield Key("throttled", machine.name), machine.throttled or ""
        if machine.celsius is not None:
            key = Key("hot", machine.name)
            yield key, limits.heat(machine.celsius, raised=key in self._on)
        if machine.disk_free_bytes is not None:
            key = Key("disk_low", machine.name)
            yield key, limits.disk(machine.disk_free_bytes, raised=key in self._on)
        if machine.clock_ms is not None:
            key = Key("clock_off", machine.name)
            yield key, limits.clock(machine.clock_ms, machine.clock_error_ms, raised=key in self._on)
