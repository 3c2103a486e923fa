"""The base station's down-link shared among nodes as the allocation says: htb classes on one interface.

On one Wi-Fi channel links take turns. A node with share s of the time on a link of rate R gets s·R for sure, and
borrows up to R while others are silent. `tc` (iproute2) does the work; this needs root.
"""

import ipaddress
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bs_coordinator.bandwidth import Float, ShareLinks, allocate_layer
from wire.errors import ShapingError

_TIMEOUT_S = 10
_ROOT = "1:"
_FIRST_CLASS = 0x10
_MIN_MBPS = 0.05
"""Even a node that is hardly ever asked must be reachable."""
_TURN_BYTES = "3028"
"""Two packets: htb's own choice, a tenth of a second's worth, would let one borrower hold up the others."""


class NodeLink(NamedTuple):
    """What is known of the link to one node.

    Attributes:
        address: the node's, IPv4 or IPv6.
        mbps: rate of its link alone.
        rows: hidden states that a layer is expected to send there.
    """

    address: str
    mbps: float
    rows: float


def time_shares(links: Sequence[NodeLink]) -> Float:
    """Shares of air time with which all nodes have their rows at the same time, float64 [nodes], adding up to 1."""
    rows = np.array([[link.rows for link in links]])
    row_s = ShareLinks(np.array([1 / link.mbps for link in links]))
    shares: Float = allocate_layer(row_s.each_layer(), rows, np.zeros_like(rows), 1.0)[0]
    return shares


def shape_commands(interface: str, links: Sequence[NodeLink]) -> list[list[str]]:
    """The `tc` calls that give each node its share of the interface; traffic to others stays as it is.

    Args:
        links: each with rows above 0.

    Raises:
        ShapingError: an address is not one.
    """
    shares = time_shares(links)
    most = max(link.mbps for link in links)
    commands = [
        ["tc", "qdisc", "replace", "dev", interface, "root", "handle", _ROOT, "htb"],
        _class(interface, _ROOT, "1:1", most, most),
    ]
    for number, (link, share) in enumerate(zip(links, shares, strict=True), _FIRST_CLASS):
        class_id = f"1:{number:x}"
        commands.append(_class(interface, "1:1", class_id, max(share * link.mbps, _MIN_MBPS), link.mbps))
        commands.append(
            ["tc", "filter", "add", "dev", interface, "parent", _ROOT, *_match(link.address), "flowid", class_id]
        )
    return commands


def shape(interface: str, links: Sequence[NodeLink]) -> None:
    """Replace whatever shapes the interface.

    Raises:
        ShapingError: an address is wrong, or `tc` is missing, not allowed or failed; nothing is shaped then.
    """
    commands = shape_commands(interface, links)
    clear(interface)
    try:
        for command in commands:
            _run(command)
    except ShapingError:
        clear(interface)
        raise


def clear(interface: str) -> None:
    """Let the interface send as it would by itself.

    Raises:
        ShapingError: `tc` is missing, not allowed or failed.
    """
    # Only what somebody has set can be deleted.
    _run(["tc", "qdisc", "replace", "dev", interface, "root", "pfifo_fast"])
    _run(["tc", "qdisc", "del", "dev", interface, "root"])


def _class(interface: str, parent: str, class_id: str, mbps: float, ceil_mbps: float) -> list[str]:
    where = ["tc", "class", "add", "dev", interface, "parent", parent, "classid", class_id]
    return [
        *where,
        "htb",
        "rate",
        f"{1000 * mbps:.0f}kbit",
        "ceil",
        f"{1000 * ceil_mbps:.0f}kbit",
        "quantum",
        _TURN_BYTES,
    ]


def _match(address: str) -> list[str]:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        raise ShapingError(f"'{address}' is not an IP address") from None
    if parsed.version == 4:
        return ["protocol", "ip", "prio", "1", "u32", "match", "ip", "dst", f"{parsed}/32"]
    return ["protocol", "ipv6", "prio", "2", "u32", "match", "ip6", "dst", f"{parsed}/128"]


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except FileNotFoundError:
        raise ShapingError("'tc' is missing: install iproute2") from None
    except subprocess.CalledProcessError as error:
        raise ShapingError(f"'{' '.join(command)}' failed: {' '.join(error.stderr.split())}") from None
    except subprocess.TimeoutExpired:
        raise ShapingError(f"'{' '.join(command)}' did not end within {_TIMEOUT_S} s") from None
