"""How many processor cores this process may use."""

import os


def usable_cores() -> int:
    """Cores that this process may run on: all of the machine's, or those that `taskset` or a cpuset leaves it."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
