"""The base station's down-link shared among nodes as the allocation says: htb classes on one interface.

On one Wi-Fi channel links take turns. A node with share s of the time on a link of rate R gets s·R for sure, and
borrows up to R while others are silent. `tc` (iproute2) does the work; this needs root.
"""

import ipaddress
import subprocess
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bs_coordinator.airtime.allocation import Float, ShareLinks, allocate_layer
from bs_coordinator.errors import ShapingError

_TIMEOUT_S = 10
_ROOT = "1:"
_FIRST_CLASS = 0x10
_MIN_MBPS = 0.05
"""Even a node that is hardly ever asked must be reachable."""
_TURN_BYTES = "3028"
"""Two packets: htb's own choice, a tenth of a second's worth, would let one borrower hold up the others."""
_HEADROOM = 1.25
"""Of a link that is measured through its own class: without it, it could never be found to have become faster."""
_WORTH = 0.05
"""Relative change of a class's rate below which it stays."""
_MEMORY = 0.5
"""Of the rows of earlier periods, per period."""
_LEAST_ROWS = 0.01


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


def shape_commands(interface: str, links: Sequence[NodeLink], *, headroom: float = 1.0) -> list[list[str]]:
    """The `tc` calls that give each node its share of the interface; traffic to others stays as it is.

    Args:
        links: each with rows above 0.
        headroom: a node may borrow up to this many times its link's rate.

    Raises:
        ShapingError: an address is not one.
    """
    commands = [["tc", "qdisc", "replace", "dev", interface, "root", "handle", _ROOT, "htb"]]
    commands += _classes("add", interface, links, headroom)
    for number, link in enumerate(links, _FIRST_CLASS):
        where = ["tc", "filter", "add", "dev", interface, "parent", _ROOT, *_match(link.address)]
        commands.append([*where, "flowid", f"1:{number:x}"])
    return commands


def shape(interface: str, links: Sequence[NodeLink], *, headroom: float = 1.0) -> None:
    """Replace whatever shapes the interface; see `shape_commands`.

    Raises:
        ShapingError: an address is wrong, or `tc` is missing, not allowed or failed; nothing is shaped then.
    """
    commands = shape_commands(interface, links, headroom=headroom)
    clear(interface)
    try:
        for command in commands:
            _run(command)
    except ShapingError:
        clear(interface)
        raise


class Shaper:
    """Shares that follow what is measured: the links' rates, and the rows that each node was sent.

    Attributes:
        links: that the interface is shaped for now.
    """

    def __init__(self, interface: str, addresses: Mapping[str, str]) -> None:
        """Nothing is shaped yet.

        Args:
            addresses: by node.

        Raises:
            ShapingError: an address is not one.
        """
        for address in addresses.values():
            _match(address)
        self.links: Sequence[NodeLink] = ()
        self._interface = interface
        self._addresses = dict(addresses)
        self._rows = dict.fromkeys(addresses, 0.0)

    def update(self, mbps: Mapping[str, float], rows: Mapping[str, float]) -> bool:
        """Take in one period; whether that changed the interface. It is shaped once all rates are known.

        Args:
            mbps: rates of the links, by node.
            rows: hidden states sent in this period, by node.

        Raises:
            ShapingError: see `shape`.
        """
        for node in self._rows:
            self._rows[node] = _MEMORY * self._rows[node] + (1 - _MEMORY) * rows.get(node, 0.0)
        if not mbps.keys() >= self._addresses.keys():
            return False
        busiest = max(self._rows.values()) or 1.0
        links = [
            NodeLink(address, mbps[node], max(self._rows[node] / busiest, _LEAST_ROWS))
            for node, address in self._addresses.items()
        ]
        if not self.links:
            shape(self._interface, links, headroom=_HEADROOM)
        elif np.allclose(_rates(links), _rates(self.links), rtol=_WORTH, atol=0):
            return False
        else:
            # Changed in place: what waits in the classes is not lost.
            for command in _classes("change", self._interface, links, _HEADROOM):
                _run(command)
        self.links = links
        return True


def clear(interface: str) -> None:
    """Let the interface send as it would by itself.

    Raises:
        ShapingError: `tc` is missing, not allowed or failed.
    """
    # Only what somebody has set can be deleted.
    _run(["tc", "qdisc", "replace", "dev", interface, "root", "pfifo_fast"])
    _run(["tc", "qdisc", "del", "dev", interface, "root"])


def _rates(links: Sequence[NodeLink]) -> Float:
    """float64 [nodes, 2]: Mbit/s that each node has for sure, and those of its link."""
    mbps = np.array([link.mbps for link in links])
    rates: Float = np.column_stack([np.maximum(time_shares(links) * mbps, _MIN_MBPS), mbps])
    return rates


def _classes(verb: str, interface: str, links: Sequence[NodeLink], headroom: float) -> list[list[str]]:
    most = headroom * max(link.mbps for link in links)
    commands = [_class(verb, interface, _ROOT, "1:1", most, most)]
    for number, (sure_mbps, mbps) in enumerate(_rates(links), _FIRST_CLASS):
        commands.append(_class(verb, interface, "1:1", f"1:{number:x}", sure_mbps, headroom * mbps))
    return commands


def _class(verb: str, interface: str, parent: str, class_id: str, mbps: float, ceil_mbps: float) -> list[str]:
    where = ["tc", "class", verb, "dev", interface, "parent", parent, "classid", class_id]
    rates = ["rate", f"{1000 * mbps:.0f}kbit", "ceil", f"{1000 * ceil_mbps:.0f}kbit"]
    return [*where, "htb", *rates, "quantum", _TURN_BYTES]


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
