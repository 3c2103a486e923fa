"""A node's wall clock in the payload of a PONG: when the PING arrived and when the PONG left, by that clock."""

import struct
import time

_STAMPS = struct.Struct("<QQ")
STAMP_BYTES = _STAMPS.size
"""A PING that asks for fewer bytes gets no stamps."""


def stamped_payload(arrived_ns: int, length: int) -> bytes:
    """The payload of a PONG that leaves now.

    Args:
        arrived_ns: `time.perf_counter_ns()` when the PING was read off the socket.
        length: bytes that were asked for.
    """
    if length < STAMP_BYTES:
        return bytes(length)
    # The sum of two clocks can be late by the time between reading them, never early: `now` is read last.
    since_ns = time.perf_counter_ns() - arrived_ns
    now = time.time_ns()
    return _STAMPS.pack(now - since_ns, now) + bytes(length - STAMP_BYTES)


def read_stamps(payload: bytes) -> tuple[int, int] | None:
    """Nanoseconds since 1970 at which the PING arrived and the PONG left; None where there are none."""
    if len(payload) < STAMP_BYTES:
        return None
    arrived_unix_ns, left_unix_ns = _STAMPS.unpack_from(payload)
    return (arrived_unix_ns, left_unix_ns) if 0 < arrived_unix_ns <= left_unix_ns < 2**63 else None
