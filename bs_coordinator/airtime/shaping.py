"""Shapes the base station's down-link by the allocation of air time: htb classes on one interface.

On one Wi-Fi channel links take turns. A node with a share s of the time on a link of rate R is guaranteed s·R, and may
borrow up to R while the others are silent. Uses `tc` (iproute2), which needs root.
"""

import ipaddress
import subprocess
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bs_coordinator.airtime.allocation import Float, ShareLinks, allocate_layer
from bs_coordinator.errors import ShapingError
from common.child_output import run_parsed
from common.moving_average import MovingAverage

_TIMEOUT_S = 10
_ROOT = "1:"
_FIRST_CLASS = 0x10
_MIN_MBPS = 0.05
"""A node that is hardly ever asked must still be reachable."""
_TURN_BYTES = "3028"
"""Two packets. With htb's default, a tenth of a second's bytes, one borrower would delay the others."""
_HEADROOM = 1.25
"""Factor on a link's measured rate. The rate is measured through the class, so without it no increase could show."""
_MIN_CHANGE = 0.05
"""A class is changed only if its rate differs by more than this share."""
_MEMORY = 0.5
"""Weight of the rows of earlier periods, per period."""
_MIN_ROWS = 0.01


class ShapedLink(NamedTuple):
    """The link to one node.

    Attributes:
        address: of the node, IPv4 or IPv6.
        mbps: rate of the link alone.
        rows: hidden states that a layer is expected to send to the node; only ratios between nodes count.
    """

    address: str
    mbps: float
    rows: float


def time_shares(links: Sequence[ShapedLink]) -> Float:
    """Shares of air time with which all nodes receive their rows at the same time, float64 [nodes], with sum 1."""
    rows = np.array([[link.rows for link in links]])
    row_s = ShareLinks(np.array([1 / link.mbps for link in links]))
    shares: Float = allocate_layer(row_s.each_layer(), rows, np.zeros_like(rows), 1.0)[0]
    return shares


def shape_commands(interface: str, links: Sequence[ShapedLink], *, headroom: float = 1.0) -> list[list[str]]:
    """The `tc` calls that give each node its share of the interface. Traffic to other hosts is not shaped.

    Args:
        interface: name of the network interface.
        links: each with rows above 0.
        headroom: a node may borrow up to this many times its link's rate.

    Raises:
        ShapingError: an address is not an IP address.
    """
    commands = [["tc", "qdisc", "replace", "dev", interface, "root", "handle", _ROOT, "htb"]]
    commands += _classes("add", interface, links, headroom)
    for number, link in enumerate(links, _FIRST_CLASS):
        where = ["tc", "filter", "add", "dev", interface, "parent", _ROOT, *_match(link.address)]
        commands.append([*where, "flowid", f"1:{number:x}"])
    return commands


def shape(interface: str, links: Sequence[ShapedLink], *, headroom: float = 1.0) -> None:
    """Replace the interface's queueing discipline with classes that give each node its share.

    Args:
        interface: name of the network interface.
        links: each with rows above 0.
        headroom: a node may borrow up to this many times its link's rate.

    Raises:
        ShapingError: an address is invalid, or `tc` is missing, not permitted or failed; nothing is shaped then.
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
    """Shapes an interface by the measured rates of the links and the rows that each node was sent.

    Attributes:
        links: that the interface is shaped for at present; empty before the first time.
    """

    def __init__(self, interface: str, addresses: Mapping[str, str]) -> None:
        """Check the addresses. Nothing is shaped yet.

        Args:
            interface: name of the network interface.
            addresses: IP addresses by node.

        Raises:
            ShapingError: an address is not an IP address.
        """
        for address in addresses.values():
            _match(address)
        self.links: Sequence[ShapedLink] = ()
        self._interface = interface
        self._addresses = dict(addresses)
        self._rows = {node: MovingAverage(_MEMORY) for node in addresses}

    def update(self, mbps: Mapping[str, float], rows: Mapping[str, float]) -> bool:
        """Take in one period; returns whether that changed the interface. It is shaped once all rates are known.

        Args:
            mbps: rates of the links, by node.
            rows: hidden states sent in this period, by node.

        Raises:
            ShapingError: `tc` is missing, not permitted or failed.
        """
        for node, average in self._rows.items():
            average.add(rows.get(node, 0.0))
        if not mbps.keys() >= self._addresses.keys():
            return False
        busiest = max(average.value for average in self._rows.values()) or 1.0
        links = [
            ShapedLink(address, mbps[node], max(self._rows[node].value / busiest, _MIN_ROWS))
            for node, address in self._addresses.items()
        ]
        if not self.links:
            shape(self._interface, links, headroom=_HEADROOM)
        elif np.allclose(_rates(links), _rates(self.links), rtol=_MIN_CHANGE, atol=0):
            return False
        else:
            # Changed in place, so packets queued in the classes are not lost.
            for command in _classes("change", self._interface, links, _HEADROOM):
                _run(command)
        self.links = links
        return True


def clear(interface: str) -> None:
    """Restore the interface's default queueing discipline.

    Raises:
        ShapingError: `tc` is missing, not permitted or failed.
    """
    # A default discipline can't be deleted, so set one first.
    _run(["tc", "qdisc", "replace", "dev", interface, "root", "pfifo_fast"])
    _run(["tc", "qdisc", "del", "dev", interface, "root"])


def _rates(links: Sequence[ShapedLink]) -> Float:
    """float64 [nodes, 2]: each node's guaranteed Mbit/s, and those of its link."""
    mbps = np.array([link.mbps for link in links])
    rates: Float = np.column_stack([np.maximum(time_shares(links) * mbps, _MIN_MBPS), mbps])
    return rates


def _classes(verb: str, interface: str, links: Sequence[ShapedLink], headroom: float) -> list[list[str]]:
    most = headroom * max(link.mbps for link in links)
    commands = [_class(verb, interface, _ROOT, "1:1", most, most)]
    for number, (guaranteed_mbps, mbps) in enumerate(_rates(links), _FIRST_CLASS):
        commands.append(_class(verb, interface, "1:1", f"1:{number:x}", guaranteed_mbps, headroom * mbps))
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
        done = run_parsed(command, timeout_s=_TIMEOUT_S)
    except FileNotFoundError:
        raise ShapingError("'tc' is missing: install the package iproute2") from None
    except subprocess.TimeoutExpired:
        raise ShapingError(f"'{' '.join(command)}' did not end within {_TIMEOUT_S} s") from None
    if done.returncode:
        raise ShapingError(f"'{' '.join(command)}' failed: {' '.join(done.stderr.split())}")
