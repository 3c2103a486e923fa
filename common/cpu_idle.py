"""Disables the idle states of processor cores (Linux PM QoS).

Computing a token is a chain of short waits, and idle cores enter sleep states in each of them. Waking a core takes
time; on a virtual machine, the host's core has to wake as well.
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
    """Ask the kernel to keep all cores out of sleep states within the context. This costs power.

    Args:
        device: the kernel's PM QoS interface; a request holds for as long as it is open.

    Yields:
        Whether the kernel accepted the request; if not, the reason is logged.
    """
    try:
        # Without creating it: if the kernel has no such device, a file of this name would have no effect.
        file = device.open("r+b", buffering=0)
    except OSError as error:
        log.warning("CPU idle states stay enabled: can't open %s: %s", device, error.strerror)
        yield False
        return
    with file:
        file.write(_LATENCY_US.pack(0))
        yield True
