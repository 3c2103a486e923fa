"""Recognises the kind of device from its kernel's and system's files, and says how many threads suit it."""

import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil

from common.cores import usable_cpus
from wire.device_profiles import PROFILES, DeviceName, DeviceProfile

if TYPE_CHECKING:
    from wire.manifest import Scheme

_PI5 = re.compile(r"Raspberry Pi (?:5|500|Compute Module 5)\b")
_PI4 = re.compile(r"Raspberry Pi (?:4|400|Compute Module 4)\b")
_ORIN = re.compile(r"\bOrin\b")
_DOT_PRODUCT = "asimddp"
_NEEDS_DOT_PRODUCT = ("int4", "int8")


class DetectedDevice(NamedTuple):
    """The kind of this device.

    Attributes:
        because: what it was recognised by, for people.
        dot_product: whether its cores have dot-product instructions, which 4- and 8-bit kernels need to be fast; None
            on x86, where it does not matter.
    """

    name: DeviceName
    because: str
    dot_product: bool | None = None

    @property
    def profile(self) -> DeviceProfile:
        """What suits this kind of device."""
        return PROFILES[self.name]


def board_model(root: Path = Path("/")) -> str:
    """The board's name in the device tree, such as `Raspberry Pi 5 Model B Rev 1.0`; empty on a PC."""
    return _text(root / "proc/device-tree/model").rstrip("\0\n")


def detect(root: Path = Path("/"), machine: str = "") -> DetectedDevice:
    """Recognise this device.

    Args:
        root: folder that holds /proc, /sys and /etc.
        machine: processor architecture; this machine's if empty.
    """
    machine = machine or platform.machine()
    if machine in ("x86_64", "AMD64", "amd64", "i686"):
        return DetectedDevice("x86", f"a {machine} processor")
    features = re.search(r"^Features\s*:\s*(.*)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    dot_product = _DOT_PRODUCT in features[1].split() if features else None
    model = board_model(root)
    for name, pattern in (("pi5", _PI5), ("pi4", _PI4), ("jetson-orin", _ORIN)):
        if pattern.search(model):
            return DetectedDevice(name, model, dot_product)  # type: ignore[arg-type]
    # In a container the device tree may be hidden. Earlier releases also ran on Xavier, later ones run on Thor.
    release = re.match(r"# R36\b", _text(root / "etc/nv_tegra_release"))
    if release:
        return DetectedDevice("jetson-orin", "/etc/nv_tegra_release says R36", dot_product)
    return DetectedDevice("generic-arm64", model or f"a {machine} processor", dot_product)


def named(name: DeviceName, root: Path = Path("/")) -> DetectedDevice:
    """A device of the kind that the user named, with the instructions that this one has."""
    found = detect(root)
    return DetectedDevice(name, "as configured", None if name == "x86" else found.dot_product)


def threads_for(device: DetectedDevice, root: Path = Path("/")) -> int:
    """Threads to compute with: one per core that this process may use, at most the profile's limit.

    Slow cores are left out if there are faster ones; on x86, only physical cores count.
    """
    allowed = usable_cpus()
    cores = len(allowed)
    if device.name == "x86":
        cores = min(cores, psutil.cpu_count(logical=False) or cores)
    else:
        capacities = [_capacity(root, cpu) for cpu in allowed]
        # Every step waits for its slowest thread, so a slow core among fast ones costs more than it adds.
        cores = sum(capacity == max(capacities) for capacity in capacities)
    return max(1, min(cores, device.profile.most_threads or cores))


def advice(device: DetectedDevice, scheme: "Scheme") -> str:
    """Why another quantisation would suit this device better, for people; empty if none would."""
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
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
