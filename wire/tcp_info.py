"""What the Linux kernel knows of a TCP connection (`TCP_INFO`): smallest round trip and delivery rate."""

import socket
import struct
import sys

from wire.status import SocketFacts

_TCP_INFO = 11
_DELIVERY_RATE_END = 168
# linux/tcp.h, struct tcp_info: a bit field in byte 7, u32 tcpi_min_rtt (µs), u64 tcpi_delivery_rate (bytes/s).
_APP_LIMITED_BYTE, _APP_LIMITED_BIT = 7, 1
_MIN_RTT = struct.Struct("=I"), 148
_DELIVERY_RATE = struct.Struct("=Q"), 160


def read_socket_facts(sock: socket.socket) -> SocketFacts | None:
    """The kernel's account of the direction in which this socket sends; None where there is none.

    Kernels before 4.9 and other systems do not measure it, and a closed socket has nothing to say.
    """
    if sys.platform != "linux":
        return None
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, 256)
        host, port = sock.getsockname()[:2]
    except OSError:
        return None
    if len(info) < _DELIVERY_RATE_END:
        return None
    (min_rtt_us,) = _MIN_RTT[0].unpack_from(info, _MIN_RTT[1])
    (delivery_bytes_per_s,) = _DELIVERY_RATE[0].unpack_from(info, _DELIVERY_RATE[1])
    return SocketFacts(
        endpoint=f"{host}:{port}",
        min_rtt_us=min_rtt_us,
        delivery_bytes_per_s=delivery_bytes_per_s,
        app_limited=bool(info[_APP_LIMITED_BYTE] & _APP_LIMITED_BIT),
    )
