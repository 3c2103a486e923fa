"""Emulated networks whose links are all alike, with a profile for each kind of links."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from common.files import atomic_write
from testbed.network.spec import LinkSpec, NetworkSpec, Profile

DEDICATED_MBPS = 100


class Links(NamedTuple):
    """Links that are all alike.

    Attributes:
        rtt_ms: round trip of each.
        mbps: rate of each, in both directions, or of the channel.
        shared_air: whether all share one channel.
    """

    rtt_ms: float
    mbps: float = DEDICATED_MBPS
    shared_air: bool = False

    @property
    def profile(self) -> str:
        """Name of the network's profile."""
        return f"{'shared' if self.shared_air else 'dedicated'}-{self.mbps:g}-{self.rtt_ms:g}"


def write_network(path: Path, name: str, nodes: Sequence[str], links: Sequence[Links]) -> None:
    """Write the description of a network to a file.

    Args:
        name: of the network.
        nodes: ids.
        links: one profile each; the first is active when the network comes up.

    Raises:
        StorageError: the file could not be written.
    """
    profiles = {}
    for one in links:
        link = LinkSpec(down_mbps=one.mbps, up_mbps=one.mbps, delay_ms=one.rtt_ms / 2)
        profiles[one.profile] = Profile(shared_air=one.shared_air, default=link)
    with atomic_write(path) as file:
        file.write(msgspec.yaml.encode(NetworkSpec(name=name, nodes=tuple(nodes), profiles=profiles)))
