"""Network namespaces and TAP interfaces for emulated networks. Linux, as root.

Only namespaces whose names begin with `PREFIX` are made or removed, and interfaces only inside these. A TAP is not
persistent: it vanishes with the file descriptor that its relay holds, however that process ends.
"""

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyroute2 import IPRoute, NetlinkError, netns

from testbed.errors import NetworkError, PrivilegeError

FOLDER = Path("/run/netns")
PREFIX = "wdmoe"
INTERFACE = "wifi0"

_TUN = Path("/dev/net/tun")
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
_CAP_NET_ADMIN, _CAP_SYS_ADMIN = 12, 21


def check_privileges() -> None:
    """Check that this process has the rights that emulated networks need.

    Raises:
        PrivilegeError: this process can't make namespaces or TAPs.
    """
    lacks = [
        name
        for name, bit in (("CAP_NET_ADMIN", _CAP_NET_ADMIN), ("CAP_SYS_ADMIN", _CAP_SYS_ADMIN))
        if not _effective_capabilities() >> bit & 1
    ]
    if not _TUN.exists() or not os.access(_TUN, os.R_OK | os.W_OK):
        lacks.append(f"access to {_TUN}")
    if lacks:
        raise PrivilegeError(
            f"emulated networks need root, this process lacks {', '.join(lacks)}: run as root, or use plans with "
            "'network: localhost'"
        )


def _effective_capabilities() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:"))


def namespace(network: str, host: str) -> str:
    """The name of a host's namespace; it is unique because network names contain no hyphen."""
    return f"{PREFIX}-{network}-{host}"


def existing() -> dict[str, list[str]]:
    """Names of all namespaces of emulated networks, by network, whether in use or left over."""
    found: dict[str, list[str]] = {}
    for name in sorted(netns.listnetns(str(FOLDER))):
        prefix, _, rest = name.partition("-")
        network, _, host = rest.partition("-")
        if prefix == PREFIX and network and host:
            found.setdefault(network, []).append(name)
    return found


def create(name: str) -> None:
    """Make a namespace with loopback up and IPv6 off, whose neighbour discovery would disturb measurements.

    Raises:
        NetworkError: the kernel refuses.
    """
    try:
        netns.create(name)
    except OSError as error:
        raise NetworkError(f"can't make the network namespace {name}: {error.strerror or error}") from None
    with inside(name):
        switch = Path("/proc/sys/net/ipv6/conf/all/disable_ipv6")
        if switch.exists():
            switch.write_text("1")
        with IPRoute() as route:
            route.link("set", index=1, state="up")


def remove(name: str) -> None:
    """Remove a namespace; processes in it keep running, without a network.

    Raises:
        NetworkError: the kernel refuses.
    """
    if not name.startswith(f"{PREFIX}-"):
        raise ValueError(f"{name} is not a namespace of an emulated network: its name must begin with '{PREFIX}-'")
    try:
        netns.remove(str(FOLDER / name))
    except FileNotFoundError:
        return
    except OSError as error:
        raise NetworkError(f"can't remove the network namespace {name}: {error.strerror}") from None


@contextmanager
def inside(name: str) -> Iterator[None]:
    """Run the body in a namespace. It moves only the calling thread."""
    home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        netns.setns(str(FOLDER / name), flags=0)
        try:
            yield
        finally:
            netns.setns(home)
    finally:
        os.close(home)


def forward_between_nodes() -> None:
    """Let this thread's namespace, the base station's, pass packets from node to node, as an access point does.

    Without this nodes reach the base station only. With it each packet takes both nodes' links.

    Raises:
        NetworkError: the kernel refuses.
    """
    ipv4 = Path("/proc/sys/net/ipv4")
    # It answers ARP requests for nodes on behalf of them, on the interface on which they arrive.
    settings = {"ip_forward": "1", f"conf/{INTERFACE}/proxy_arp": "1", f"conf/{INTERFACE}/proxy_arp_pvlan": "1"}
    # Nodes must not be told of a shorter way, which they lack.
    settings |= {"conf/all/send_redirects": "0", f"conf/{INTERFACE}/send_redirects": "0"}
    try:
        for name, value in settings.items():
            (ipv4 / name).write_text(value)
    except OSError as error:
        raise NetworkError(f"can't let nodes reach each other: {error.strerror or error}") from None


def open_tap(name: str, address: str, prefix_bits: int, mac: str, *, mtu_bytes: int) -> int:
    """Make a TAP in a namespace and bring it up; closing the descriptor removes it.

    Raises:
        NetworkError: the kernel refuses.
    """
    with inside(name):
        tap = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", INTERFACE.encode(), _IFF_TAP | _IFF_NO_PI))
            with IPRoute() as route:
                index = route.link_lookup(ifname=INTERFACE)[0]
                route.link("set", index=index, address=mac, mtu=mtu_bytes)
                route.addr("add", index=index, address=address, prefixlen=prefix_bits)
                route.link("set", index=index, state="up")
        except (OSError, NetlinkError) as error:
            os.close(tap)
            raise NetworkError(f"can't make a TAP in {name}: {error}") from None
    return tap
