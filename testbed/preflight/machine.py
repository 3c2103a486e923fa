"""Checks of the machine that this process runs on; nothing is started or changed."""

import os
import subprocess

from common import real_time
from common.child_output import run_parsed
from common.cores import usable_cores
from testbed import facts
from testbed.preflight.verdicts import Check, Level


def clock(*, several_machines: bool) -> Check:
    """Whether this machine's clock is synchronised.

    Durations use one clock each; only lining up the logs of several machines needs clocks that agree.
    """
    level: Level = "warn" if several_machines else "pass"
    effect = "logs of several machines can't be lined up" if several_machines else "one machine, one clock"
    try:
        argv = ["timedatectl", "show", "-p", "NTPSynchronized", "--value"]
        answer = run_parsed(argv, timeout_s=5).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        answer = ""
    if answer == "yes":
        return Check("clock", "pass", "synchronised")
    return Check("clock", level, f"{'not synchronised' if answer == 'no' else 'synchronisation unknown'}; {effect}")


def governor() -> Check:
    """Whether this machine's processor is throttled, or changes its frequency."""
    power = facts.power()
    if power.get("throttled", "0x0") != "0x0":
        return Check("CPU", "warn", f"throttled now or since boot ({power['throttled']}): cooling or power supply")
    governors = power.get("governors")
    if not governors:
        return Check("CPU", "pass", "no frequency governor")
    if governors == ["performance"]:
        return Check("CPU", "pass", "governor performance")
    hint = "'cpupower frequency-set -g performance' makes times more stable"
    return Check("CPU", "warn", f"governor {', '.join(governors)}: {hint}")


def priority() -> Check:
    """Whether base station and broker get real-time priority, so that a token need not wait for other work."""
    if reason := real_time.why_not():
        return Check("priority", "warn", f"no real-time priority, so other work delays tokens: {reason}")
    return Check("priority", "pass", "real-time priority is permitted")


def load() -> Check:
    """Whether other work keeps this machine busy."""
    busy, cpus = os.getloadavg()[0], usable_cores()
    level: Level = "warn" if busy > 0.5 * cpus else "pass"
    return Check(
        "load", level, f"{busy:.1f} on {cpus} CPUs" + (": other work will disturb the measurement" * (level != "pass"))
    )
