"""Which kind of device this is, from what its kernel and system say, and how many threads suit it."""

import os
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil

from wire.device_profiles import PROFILES, DeviceName, DeviceProfile

if TYPE_CHECKING:
    from wire.manifest import Scheme

_PI5 = re.compile(r"Raspberry Pi (?:5|500|Compute Module 5)\b")
_PI4 = re.compile(r"Raspberry Pi (?:4|400|Compute Module 4)\b")
_ORIN = re.compile(r"\bOrin\b")
_DOT_PRODUCT = "asimddp"
_NEEDS_DOT_PRODUCT = ("int4", "int8")


class Device(NamedTuple):
    """A device.

    Attributes:
        because: what it was recognised by, for people.
        dot_product: whether its cores have what 4- and 8-bit kernels live on; None where the question is not asked.
    """

    name: DeviceName
    because: str
    dot_product: bool | None = None

    @property
    def profile(self) -> DeviceProfile:
        """What suits it."""
        return PROFILES[self.name]


def board_model(root: Path = Path("/")) -> str:
    """The board's name in the device tree, such as `Raspberry Pi 5 Model B Rev 1.0`; empty on a PC."""
    return _text(root / "proc/device-tree/model").rstrip("\0\n")


def detect(root: Path = Path("/"), machine: str = "") -> Device:
    """What this device is.

    Args:
        root: below which /proc and /etc lie.
        machine: processor architecture; this machine's if empty.
    """
    machine = machine or platform.machine()
    if machine in ("x86_64", "AMD64", "amd64", "i686"):
        return Device("x86", f"a {machine} processor")
    features = re.search(r"^Features\s*:\s*(.*)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    dot_product = _DOT_PRODUCT in features[1].split() if features else None
    model = board_model(root)
    for name, pattern in (("pi5", _PI5), ("pi4", _PI4), ("jetson-orin", _ORIN)):
        if pattern.search(model):
            return Device(name, model, dot_product)  # type: ignore[arg-type]
    # In a container the device tree may be hidden. Releases before 36 ran on Xavier as well, those after on Thor.
    release = re.match(r"# R36\b", _text(root / "etc/nv_tegra_release"))
    if release:
        return Device("jetson-orin", "/etc/nv_tegra_release says R36", dot_product)
    return Device("generic-arm64", model or f"a {machine} processor", dot_product)


def named(name: DeviceName, root: Path = Path("/")) -> Device:
    """The device that the user says this is."""
    found = detect(root)
    return Device(name, "as told", None if name == "x86" else found.dot_product)


def threads_for(device: Device, root: Path = Path("/")) -> int:
    """Threads to compute with: one per core that this process may use, of the fast ones where cores differ, and of
    x86's the physical ones, within the profile's limit."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = len(allowed)
    if device.name == "x86":
        cores = min(cores, psutil.cpu_count(logical=False) or cores)
    else:
        capacities = [_capacity(root, cpu) for cpu in allowed]
        # Every step waits for the slowest thread: a slow core among fast ones costs more than it gives.
        cores = sum(capacity == max(capacities) for capacity in capacities)
    return max(1, min(cores, device.profile.most_threads or cores))


def advice(device: Device, scheme: "Scheme") -> str:
    """Why another quantisation would suit this device better; empty if none would."""
    profile = device.profile
    slow = device.dot_product is False or (device.dot_product is None and device.name == "pi4")
    if scheme in _NEEDS_DOT_PRODUCT and slow:
        return f"{scheme} is slow here: its cores lack dot product; export with --quant int8-dynamic"
    if scheme in ("fp32", "fp16") and profile.scheme != scheme:
        return f"{scheme} takes several times the time and memory of {profile.scheme}: {profile.reason}"
    return ""


def _capacity(root: Path, cpu: int) -> int:
    text = _text(root / f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity").strip()
    return int(text) if text.isdigit() else 0


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
