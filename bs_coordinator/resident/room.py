"""How much memory local experts take. Pure."""

from typing import NamedTuple

from edge_node.experts import needed_bytes
from wire.manifest import Manifest


class Room(NamedTuple):
    """RAM in bytes, upper estimates.

    Attributes:
        all_bytes: of all experts.
        one_bytes: of the largest expert alone, with all its slices.
    """

    all_bytes: int
    one_bytes: int


def needed_room(manifest: Manifest) -> Room:
    """What a bundle's experts take on the base station."""
    scheme = manifest.quantisation.scheme
    largest = max(manifest.experts, key=lambda entry: entry.bytes)
    return Room(needed_bytes(manifest.experts, scheme), needed_bytes([largest] * manifest.dims.slices, scheme))
