"""Whether the chosen experts fit into this device's memory: asked before the first one is loaded."""

from collections.abc import Iterable
from pathlib import Path

import psutil

from wire.errors import MemoryBudgetError
from wire.manifest import ExpertEntry, Scheme

RESIDENT_PER_FILE_BYTE: dict[Scheme, float] = {
    "int4": 2.1,
    "int8": 2.1,
    "int8-dynamic": 2.1,
    "fp16": 3.1,
    "fp32": 2.1,
}
"""RAM of a loaded expert ÷ bytes of its files, rounded up. onnxruntime keeps a prepacked copy of each weight
beside the file's own pages (fp16 weights are widened to fp32 once)."""
SESSION_BYTES = 512 << 10
"""What a session takes whatever its size."""
RESERVE_BYTES = 64 << 20
"""Left to the system: buffers, the MQTT client, the next fork of a shell."""


def needed_bytes(entries: Iterable[ExpertEntry], scheme: Scheme) -> int:
    """RAM that these experts take once loaded (an estimate from above)."""
    factor = RESIDENT_PER_FILE_BYTE[scheme]
    return sum(int(entry.bytes * factor) + SESSION_BYTES for entry in entries)


def available_bytes() -> int:
    """RAM that a process may still take: what the kernel would give, or less under a cgroup limit."""
    available = psutil.virtual_memory().available
    cgroup = _cgroup_free_bytes()
    return max(0, (available if cgroup is None else min(available, cgroup)) - RESERVE_BYTES)


def check_memory(needed: int, *, budget: int | None) -> None:
    """Refuse what does not fit.

    Args:
        needed: bytes that the experts take.
        budget: the user's own limit in bytes, on top of the device's.

    Raises:
        MemoryBudgetError: with both numbers.
    """
    available = available_bytes()
    source = "available on this device"
    if budget is not None and budget < available:
        available, source = budget, "allowed by --memory-budget"
    if needed > available:
        raise MemoryBudgetError(
            f"the experts need about {needed / 2**20:.0f} MiB of RAM, {available / 2**20:.0f} MiB are "
            f"{source}: "
            "choose fewer experts, a smaller quantisation or another device",
            needed_bytes=needed,
            available_bytes=available,
        )


def _cgroup_free_bytes(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes left under the memory limit of our cgroup (v2), or None where there is no limit."""
    try:
        own = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2].lstrip("/")
    except OSError:
        return None
    free: int | None = None
    for folder in (root / own, *(root / own).parents):
        if folder != root and root not in folder.parents:
            break
        try:
            limit = (folder / "memory.max").read_text().strip()
            current = int((folder / "memory.current").read_text())
        except (OSError, ValueError):
            continue
        if limit.isdigit():
            left = int(limit) - current
            free = left if free is None else min(free, left)
    return free
