"""Keeping processor cores out of sleep (Linux PM QoS).

A token is a chain of short waits, and cores fall asleep in each of them. To wake one takes time, on a virtual machine
that of its host as well.
"""

import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

DEVICE = Path("/dev/cpu_dma_latency")
_LATENCY_US = struct.Struct("=i")


@contextmanager
def cpu_idle_disabled(device: Path = DEVICE) -> Iterator[bool]:
    """Ask the kernel not to let any core sleep meanwhile; it costs power.

    Args:
        device: the kernel's PM QoS interface: holds for as long as it is open.

    Yields:
        Whether the kernel took the request; if not, why is logged.
    """
    try:
        # Opened without creating: where the kernel has no such device, a file would be nothing but litter.
        file = device.open("r+b", buffering=0)
    except OSError as error:
        log.warning("cores may fall asleep while they wait: can't open %s: %s", device, error.strerror)
        yield False
        return
    with file:
        file.write(_LATENCY_US.pack(0))
        yield True
