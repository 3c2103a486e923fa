"""Tells systemd that this service is ready, and still alive: sd_notify(3), which is one datagram."""

import os
import socket


def notify(state: str) -> None:
    """Send `READY=1`, `WATCHDOG=1`, `STATUS=…` or `STOPPING=1`; without systemd, this does nothing."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(state.encode(), address)
        except OSError:
            return  # systemd is restarting: the next message, or its watchdog, will do
