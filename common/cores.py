"""The processor cores that this process may use."""

import os


def usable_cpus() -> set[int]:
    """Numbers of the cores that this process may run on: all, or those that `taskset` or a cpuset leaves it."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def usable_cores() -> int:
    """How many these are."""
    return len(usable_cpus())
