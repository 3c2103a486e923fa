"""What the processor that runs the tests does to int8-dynamic."""

import platform
from pathlib import Path


def saturates() -> bool:
    """Whether products of signed weights are added up in 16 bits here: x86 without VNNI (see `exporter.graph`)."""
    return platform.machine() == "x86_64" and "vnni" not in Path("/proc/cpuinfo").read_text()
