"""Whether the chosen experts fit into this device's memory, before the first one is loaded."""

import ctypes
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from common.memory import available_bytes
from edge_node.errors import MemoryBudgetError
from wire.manifest import ExpertEntry, Scheme

RESIDENT_PER_FILE_BYTE: dict[Scheme, float] = {
    "int4": 1.6,
    "int8": 1.4,
    "int8-dynamic": 1.15,
    "fp16": 2.2,
    "fp32": 1.15,
}
"""RAM of a loaded expert ÷ bytes of its files: the larger of the ratios measured with experts of hidden size 576 and
4096 on x86-64 (1.54, 1.31, 1.01, 2.02, 1.07), rounded up. onnxruntime repacks quantised weights in addition to the
file's pages, and widens fp16 weights to fp32."""
SESSION_BYTES = 512 << 10
"""RAM of a session on top of its weights."""


_HUGE_PAGE = 2 << 20
_LARGE_BLOCK = 8 << 20
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
_ANONYMOUS = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) rw-p 0+ 00:00 0\s*$", re.MULTILINE)
_RSS = re.compile(r"^Rss:\s+(\d+) kB", re.MULTILINE)
_HUGE = re.compile(r"^AnonHugePages:\s+(\d+) kB", re.MULTILINE)

_libc = ctypes.CDLL(None)


def return_freed_memory() -> None:
    """Return freed memory to the system, if the C library can (glibc).

    Loading an expert frees about as much memory as it keeps, and glibc would retain it: 376 of 1019 MiB with fp16
    experts of hidden size 576.
    """
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


def use_huge_pages() -> None:
    """Move large blocks of memory that are wholly in use to huge pages, if the kernel can (Linux 6.1 or newer).

    An expert of Mixtral's size is read from end to end for every token. With pages of 4 KiB, address translation takes
    as long as reading: one token took 10.7 instead of 6.6 ms.
    """
    for start, end in _blocks_on_small_pages():
        first, last = -(-start // _HUGE_PAGE) * _HUGE_PAGE, end // _HUGE_PAGE * _HUGE_PAGE
        # Kernels without these calls return an error, which changes nothing.
        _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_HUGEPAGE)
        _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_COLLAPSE)


def _blocks_on_small_pages() -> Iterator[tuple[int, int]]:
    """Start and end of this process's large anonymous mappings that are in memory as a whole, and mostly on small
    pages."""
    try:
        mappings = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="surrogateescape").split("VmFlags:")
    except OSError:
        return
    for mapping in mappings:
        header = _ANONYMOUS.search(mapping)
        if header is None:
            continue
        start, end = int(header[1], 16), int(header[2], 16)
        in_memory, huge = (1024 * int(found[1]) if (found := field.search(mapping)) else 0 for field in (_RSS, _HUGE))
        # Collapsing a mapping with holes would fill them and waste memory.
        if end - start >= _LARGE_BLOCK and in_memory >= end - start and huge < (end - start) // 2:
            yield start, end


def needed_bytes(entries: Iterable[ExpertEntry], scheme: Scheme) -> int:
    """RAM in bytes that these experts take once loaded; an upper estimate."""
    sizes = [entry.bytes for entry in entries]
    # While an expert is loaded, its file is in memory as well.
    return sum(loaded_bytes(size, scheme) for size in sizes) + max(sizes, default=0)


def loaded_bytes(file_bytes: int, scheme: Scheme) -> int:
    """RAM in bytes that one loaded expert, or slice, takes whose files have `file_bytes`; an upper estimate."""
    return int(file_bytes * RESIDENT_PER_FILE_BYTE[scheme]) + SESSION_BYTES


def fitting(entries: Iterable[ExpertEntry], scheme: Scheme, budget: int) -> int:
    """How many of these experts, whichever they are, fit into `budget` bytes at once; a lower estimate."""
    sizes = [entry.bytes for entry in entries]
    most = max(sizes, default=0)
    return max(0, min(len(sizes), (budget - most) // loaded_bytes(most, scheme)))


def largest(entries: Iterable[ExpertEntry], count: int) -> list[ExpertEntry]:
    """The `count` largest experts."""
    return sorted(entries, key=lambda entry: -entry.bytes)[:count]


def room_bytes(budget: int | None) -> int:
    """RAM in bytes that experts may take: what is available, or the user's limit `budget` if that is less."""
    available = available_bytes()
    return available if budget is None else min(budget, available)


def check_memory(needed: int, *, budget: int | None) -> None:
    """Make sure that experts fit into memory.

    Args:
        needed: bytes that the experts take.
        budget: the user's limit in bytes; None for the device's alone.

    Raises:
        MemoryBudgetError: they do not fit.
    """
    available = available_bytes()
    source = "available on this device"
    if budget is not None and budget < available:
        available, source = budget, "allowed by --memory-budget"
    if needed > available:
        raise MemoryBudgetError(
            f"the experts need about {needed / 2**20:.0f} MiB of RAM, {available / 2**20:.0f} MiB are "
            f"{source}: "
            "choose fewer experts, a smaller quantisation, another device, or --residency lru",
            needed_bytes=needed,
            available_bytes=available,
        )
