"""Finds the interface through which a host is reached."""

import socket

import psutil


def route_interface(host: str, port: int) -> str | None:
    """Name of the interface; None if there is no route, or no interface has the route's address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # chooses a route, sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address.partition("%")[0] == own for known in addresses):
            return name[:64]
    return None
