"""The quantisations to compare, by their names on the command line."""

from wire.manifest import Scheme

VARIANTS: dict[str, tuple[Scheme, int]] = {
    "fp32": ("fp32", 0), "fp16": ("fp16", 0), "int8": ("int8", 32), "int8-dynamic": ("int8-dynamic", 0),
    "int4-b32": ("int4", 32), "int4-b128": ("int4", 128),
}  # fmt: skip
"""Scheme and block size (0 where the scheme has no blocks)."""
