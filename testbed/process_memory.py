"""Memory of a process and its children."""

import contextlib
from pathlib import Path

import psutil


def memory_bytes(pid: int) -> tuple[int, int]:
    """Largest resident set so far and proportional share now of a process and its children; 0 of those that ended."""
    peak = pss = 0
    with contextlib.suppress(psutil.Error, OSError):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error, OSError):
                status = Path(f"/proc/{one.pid}/status").read_text(encoding="utf-8")
                peak += next(
                    (int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM")), 0
                )
                pss += one.memory_full_info().pss
    return peak, pss
