"""Sizes in bytes as users write them: `800M`, `2G`."""

import re

_MOST_BYTES = 2**63 - 1
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(text: str) -> int:
    """Bytes from `1500M`, `2G` or a plain number.

    Raises:
        ValueError: not a size, or more than 2⁶³ - 1 bytes.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"'{text[:80]}' is not a size: write 800M or 2G")
    size = float(match[1]) * _UNITS[match[2].upper()]
    if size > _MOST_BYTES:
        raise ValueError(f"'{text[:80]}' is more than any memory has: write 800M or 2G")
    return int(size)


def format_bytes(size: int) -> str:
    """The shortest exact form that `parse_bytes` reads: `64M` for 67108864."""
    return next(f"{size // factor}{unit}" for unit, factor in reversed(_UNITS.items()) if size % factor == 0)


def readable_bytes(size: float) -> str:
    """A size with one decimal, in the largest unit that it fills: `61.1 GiB`."""
    unit, factor = next(((u, f) for u, f in reversed(_UNITS.items()) if size >= f), ("", 1))
    return f"{size / factor:.1f} {unit}iB" if unit else f"{size:.0f} bytes"
