"""The Linux kernel's statistics of a TCP connection (`TCP_INFO`): smallest round trip and delivery rate."""

import socket
import struct
import sys
from typing import NamedTuple

_TCP_INFO = 11
_DELIVERY_RATE_END = 168
# linux/tcp.h, struct tcp_info: a bit field in byte 7, u32 tcpi_min_rtt (µs), u64 tcpi_delivery_rate (bytes/s).
_APP_LIMITED_BYTE, _APP_LIMITED_BIT = 7, 1
_MIN_RTT = struct.Struct("=I"), 148
_DELIVERY_RATE = struct.Struct("=Q"), 160


class TcpInfo(NamedTuple):
    """One TCP connection, in the direction in which its owner sends.

    Attributes:
        min_rtt_us: smallest round trip; 0 or 2³²−1 if none was measured yet.
        delivery_bytes_per_s: rate at which data was acknowledged most recently.
        app_limited: the owner had nothing more to send then, so that the link may be faster.
    """

    min_rtt_us: int
    delivery_bytes_per_s: int
    app_limited: bool


def read_tcp_info(sock: socket.socket) -> TcpInfo | None:
    """The statistics of a connected socket; None on kernels before 4.9 and other systems, and for a closed socket."""
    if sys.platform != "linux":
        return None
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, 256)
    except OSError:
        return None
    if len(info) < _DELIVERY_RATE_END:
        return None
    (min_rtt_us,) = _MIN_RTT[0].unpack_from(info, _MIN_RTT[1])
    (delivery_bytes_per_s,) = _DELIVERY_RATE[0].unpack_from(info, _DELIVERY_RATE[1])
    return TcpInfo(min_rtt_us, delivery_bytes_per_s, bool(info[_APP_LIMITED_BYTE] & _APP_LIMITED_BIT))
