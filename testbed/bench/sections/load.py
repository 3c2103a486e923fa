"""Decoding beside busy processes, with normal and with real-time priority, compared with a quiet machine."""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from bs_coordinator.broker.processes import die_with_parent
from common import real_time
from testbed.bench.rows import Result, Row, Settings, Skipped
from testbed.bench.sections.decode import NODES, decode
from testbed.bench.system import System, running, why_not
from testbed.demo_assets import demo_bundle
from testbed.network.uniform import DEDICATED_MBPS, Links
from testbed.prompts import PROMPTS

TARGET = 2.0
_RTT_MS = 5.0
_TOKENS = 14
"""Of one answer; `decode` leaves out the first four."""
_BUSY_LOOP = ["sh", "-c", "while :; do :; done"]


class _Arm(NamedTuple):
    """One way to decode."""

    raised: bool
    busy: bool


def measure(settings: Settings) -> Iterator[Result]:
    """Yield a row for normal and one for real-time priority, busy divided by quiet, and one for both when it is quiet.

    The arms take turns, answer by answer, in one running system. Without the permission for real-time priority, only
    the first row is measured.
    """
    beside = f"decode beside {settings.busy} busy processes, {_RTT_MS:g} ms, {len(NODES)} nodes"
    if why := why_not():
        yield Skipped(beside, why)
        return
    priorities = [False, True]
    if why := real_time.why_not():
        yield Skipped(f"{beside}, real-time priority", why)
        priorities = [False]
    arms = [_Arm(raised, busy) for raised in priorities for busy in (False, True)]
    bundle = demo_bundle("int4", console=settings.console)
    links = [Links(_RTT_MS)]
    with running(settings, bundle, nodes=NODES, links=links, priority="normal") as system:
        step_ms: dict[_Arm, list[float]] = {arm: [] for arm in arms}
        core_ms = {arm: dict.fromkeys(system.core_ms(), 0.0) for arm in arms}
        for i in range(max(2, settings.samples // 50)):
            for arm in arms if i % 2 else reversed(arms):
                with ExitStack() as stack:
                    if arm.raised:
                        stack.enter_context(_raised(system))
                    if arm.busy:
                        stack.enter_context(_busy_processes(settings.busy))
                    steps = decode(system, PROMPTS[i % len(PROMPTS)], tokens=_TOKENS, core_ms=core_ms[arm])
                step_ms[arm] += [step.total_ns / 1e6 for step in steps]

    def row(name: str, floor: str, ours: _Arm, other: _Arm, target: float | None) -> Row:
        tokens = len(step_ms[ours])
        parts = {what: (ms - core_ms[other][what]) / tokens for what, ms in core_ms[ours].items() if "waiting" in what}
        parameters = {
            "rtt_ms": _RTT_MS, "mbps": DEDICATED_MBPS, "bundle": bundle.name, "nodes": len(NODES),
            "busy": settings.busy, "parts": "means per token, of all processes of a role",
        }  # fmt: skip
        return Row(name, floor, step_ms[ours], step_ms[other], target, parameters, parts)

    for raised in priorities:
        kind, target = ("real-time", TARGET) if raised else ("normal", None)
        yield row(
            f"{beside}, {kind} priority", "a quiet machine, same priority", _Arm(raised, True), _Arm(raised, False),
            target,
        )  # fmt: skip
    if True in priorities:
        yield row(
            "decode on a quiet machine, real-time priority", "normal priority", _Arm(True, False), _Arm(False, False),
            None,
        )  # fmt: skip


@contextmanager
def _raised(system: System) -> Iterator[None]:
    """Give a running system what `priority: auto` gives it from the start."""
    threads = [*system.processes["nodes"], *system.processes["broker"]]
    model = system.station.model
    model.raises_priority = True
    for thread in threads:
        real_time.raise_thread(thread)
    try:
        yield
    finally:
        model.raises_priority = False
        for thread in threads:
            real_time.lower_thread(thread)


@contextmanager
def _busy_processes(count: int) -> Iterator[None]:
    """Processes that only compute, with niceness 0.

    Each is in a session of its own, as those of other users are: the kernel shares cores among sessions first where
    `sched_autogroup_enabled` is set.
    """
    with ExitStack() as stack:
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen(die_with_parent(_BUSY_LOOP), start_new_session=True))
            stack.callback(process.kill)
        yield
