"""A way past the emulated links, in the kernel, for programs that send gigabytes when they start."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyroute2 import IPRoute, NetlinkError

from testbed.errors import NetworkError
from testbed.network import namespaces
from testbed.network.daemon import BASE_STATION
from testbed.network.model import MTU_BYTES
from testbed.network.spec import NetworkSpec

_INTERFACE = "fast"


@contextmanager
def bypass(spec: NetworkSpec) -> Iterator[None]:
    """Between the base station and each node, packets take a cable for the duration of the context, not the link.

    Addresses stay the same, so connections that are open when it ends go on over the link. Traffic on the cables is
    not counted.

    Raises:
        NetworkError: the kernel refuses.
    """
    station = namespaces.namespace(spec.name, BASE_STATION)
    try:
        try:
            for number, node in enumerate(spec.node_ids, start=1):
                _plug_in(station, namespaces.namespace(spec.name, node), spec, number)
        except (OSError, NetlinkError) as error:
            raise NetworkError(f"can't make a way past the links: {error}") from None
        yield
    finally:
        with namespaces.inside(station), IPRoute() as route:
            # The other end and all routes vanish with it.
            for link in route.get_links():
                if str(link.get_attr("IFLA_IFNAME")).startswith(_INTERFACE):
                    route.link("del", index=link["index"])


def _plug_in(station: str, node: str, spec: NetworkSpec, number: int) -> None:
    name = f"{_INTERFACE}{number}"
    ends = os.open(namespaces.FOLDER / node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with namespaces.inside(station), IPRoute() as route:
            # The links' MTU: a connection keeps the segment size with which it was opened.
            peer = {"ifname": name, "net_ns_fd": ends, "mtu": MTU_BYTES}
            route.link("add", ifname=name, kind="veth", mtu=MTU_BYTES, peer=peer)
    finally:
        os.close(ends)
    # The node first: a packet must not arrive where there is no way back.
    _lead(node, name, to=spec.address(0), source=spec.address(number))
    _lead(station, name, to=spec.address(number), source=spec.address(0))


def _lead(namespace: str, name: str, *, to: str, source: str) -> None:
    """Bring an end of a cable up, and send packets for an address there."""
    with namespaces.inside(namespace), IPRoute() as route:
        # Packets of other nodes come by the cable too, and are answered over the link.
        for scope in ("all", name):
            Path(f"/proc/sys/net/ipv4/conf/{scope}/rp_filter").write_text("0")
        index = route.link_lookup(ifname=name)[0]
        route.link("set", index=index, state="up")
        route.route("add", dst=f"{to}/32", oif=index, prefsrc=source, scope="link")
