"""Facts that results depend on besides the plan: code, versions, machine, power and radio."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from bs_coordinator.broker.processes import mosquitto_path
from common.child_output import run_parsed
from common.cores import usable_cores
from wire import __version__
from wire.broker_url import without_credentials

_SYS = Path("/sys")
_PACKAGES = ("torch", "transformers", "onnxruntime", "numpy", "paho-mqtt", "amqtt", "msgspec", "pyarrow")
_ROOT = Path(__file__).resolve().parents[1]


@cache  # later changes don't affect the code that this process has loaded
def commit() -> tuple[str, bool]:
    """The project's commit, and whether tracked files differ from it; `unknown` for an installed package."""
    git = ("git", "-C", str(_ROOT))
    if not (head := output(*git, "rev-parse", "HEAD")):
        return "unknown", False
    return head, bool(output(*git, "status", "--porcelain", "--untracked-files=no"))


def code_name(commit: str, dirty: bool) -> str:
    """A version of the code in words, such as `eb27f00a1b2c with changes`."""
    return commit[:12] + (" with changes" if dirty else "")


def versions() -> dict[str, str]:
    """Versions of Python, this project, and the packages that compute or transport."""
    found = {"python": platform.python_version(), "wdmoe": __version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if mosquitto := mosquitto_path():
        # The first line of its help is the version; the exit code of -h is 3.
        first = output(mosquitto, "-h", any_code=True).partition("\n")[0]
        found["mosquitto"] = first.removeprefix("mosquitto version ").strip()
    return found


def machine() -> dict[str, Any]:
    """Host, CPU, memory and system."""
    model = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", _text(Path("/proc/cpuinfo")), re.MULTILINE)
    return {
        "host": platform.node(),
        "cpu": model[1] if model else platform.machine(),
        "arch": platform.machine(),
        "cpus": usable_cores(),
        "ram_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "load_1min": os.getloadavg()[0],
    }


def result_header(schema: int) -> dict[str, Any]:
    """The head of a document of results: when, where and with which code it was made."""
    sha, dirty = commit()
    return {
        "schema": schema,
        "commit": sha,
        "dirty": dirty,
        "unix_s": int(time.time()),
        "argv": argv(),
        "versions": versions(),
        "machine": {**machine(), **power()},
    }


def boot_id() -> str:
    """An id that changes with every boot of this machine; empty if the system has none."""
    return _text(Path("/proc/sys/kernel/random/boot_id"))


def power() -> dict[str, Any]:
    """Governors, temperatures, throttling and power supply, as far as this machine reports them."""
    facts: dict[str, Any] = {}
    cpu = _SYS / "devices/system/cpu"
    if governors := sorted({_text(f) for f in cpu.glob("cpu[0-9]*/cpufreq/scaling_governor")}):
        facts["governors"] = governors
    if frequencies := [int(_text(f)) for f in cpu.glob("cpu[0-9]*/cpufreq/scaling_cur_freq") if _text(f).isdigit()]:
        facts["frequency_khz"] = sorted(frequencies)
    zones = {
        _text(z / "type"): int(_text(z / "temp")) / 1000
        for z in sorted((_SYS / "class/thermal").glob("thermal_zone*"))
        if _text(z / "temp").lstrip("-").isdigit()
    }
    if zones:
        facts["temperature_c"] = zones
    counts = [int(_text(f)) for f in cpu.glob("cpu[0-9]*/thermal_throttle/core_throttle_count") if _text(f).isdigit()]
    if counts:
        facts["throttle_count"] = sum(counts)
    if throttled := output("vcgencmd", "get_throttled"):  # Raspberry Pi: 0x0 means no throttling
        facts["throttled"] = throttled.partition("=")[2]
    supplies = {f.parent.name: _text(f) for f in (_SYS / "class/power_supply").glob("*/online")}
    if supplies:
        facts["supplies_online"] = supplies
    return facts


def wifi() -> dict[str, str]:
    """The link of each wireless interface as reported by `iw`, without addresses and network names."""
    facts = {}
    for interface in sorted(p.parent.name for p in (_SYS / "class/net").glob("*/wireless")):
        link = output("iw", "dev", interface, "link")
        kept = [line.strip() for line in link.splitlines() if re.match(r"\s*(freq|signal|rx bitrate|tx bitrate)", line)]
        save = output("iw", "dev", interface, "get", "power_save")
        facts[interface] = "; ".join([*kept, *([save] if save else [])]) or "not associated"
    return facts


def argv(arguments: Sequence[str] = tuple(sys.argv)) -> list[str]:
    """The command line without the user names and passwords of URLs."""
    return [without_credentials(argument) for argument in arguments]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def output(*command: str, any_code: bool = False) -> str:
    """Standard output of a command; empty if it is missing, fails or takes more than 10 s.

    Args:
        any_code: accept any exit code.
    """
    try:
        done = run_parsed(command, timeout_s=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if any_code or done.returncode == 0 else ""
