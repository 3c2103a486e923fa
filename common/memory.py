"""How much RAM this process may still take."""

from pathlib import Path

import psutil

RESERVE_BYTES = 64 << 20
"""RAM left to the rest of the system: buffers, the MQTT client, a shell."""


def available_bytes() -> int:
    """RAM in bytes that this process may still take, by the kernel and by the limits of its cgroups."""
    available = psutil.virtual_memory().available
    cgroup = _cgroup_free_bytes()
    return max(0, (available if cgroup is None else min(available, cgroup)) - RESERVE_BYTES)


def _cgroup_free_bytes(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes left under the memory limits of this process's cgroup and its parents (v2); None without a limit.

    The page cache counts as free, as in the kernel's MemAvailable: otherwise a node that has read its experts once
    would have no memory left.
    """
    try:
        own = (
            Path("/proc/self/cgroup")
            .read_text(encoding="utf-8", errors="surrogateescape")
            .strip()
            .rpartition("::")[2]
            .lstrip("/")
        )
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
            left = int(limit) - max(0, current - _cache_bytes(folder))
            free = left if free is None else min(free, left)
    return free


def _cache_bytes(group: Path) -> int:
    """Bytes of page cache that the kernel drops when the cgroup needs memory; 0 if unknown.

    Locked pages and those of a tmpfs can't be dropped and are on other lists.
    """
    try:
        rows = [line.split() for line in (group / "memory.stat").read_text().splitlines()]
        return sum(int(value) for name, value in rows if name in ("inactive_file", "active_file"))
    except (OSError, ValueError):
        return 0
