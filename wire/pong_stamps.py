"""Time stamps in the payload of a PONG: when the PING arrived and when the PONG left, by the node's wall clock."""

import struct

from common.clock import Clock

_STAMPS = struct.Struct("<QQ")
STAMP_BYTES = _STAMPS.size
"""A PING that asks for fewer bytes gets no stamps."""


def stamped_payload(clock: Clock, arrived_ns: int, length: int) -> bytes:
    """The payload of a PONG that leaves now.

    Args:
        arrived_ns: `clock.perf_ns()` when the PING was read off the connection.
        length: bytes that the PING asked for.
    """
    if length < STAMP_BYTES:
        return bytes(length)
    # Two clocks are read one after the other, the wall clock last: the stamps can be late by the time in between, but
    # never early.
    since_ns = clock.perf_ns() - arrived_ns
    left_unix_ns = clock.unix_ns()
    return _STAMPS.pack(left_unix_ns - since_ns, left_unix_ns) + bytes(length - STAMP_BYTES)


def read_stamps(payload: bytes) -> tuple[int, int] | None:
    """Nanoseconds since 1970 at which the PING arrived and the PONG left; None if there are no valid stamps."""
    if len(payload) < STAMP_BYTES:
        return None
    arrived_unix_ns, left_unix_ns = _STAMPS.unpack_from(payload)
    return (arrived_unix_ns, left_unix_ns) if 0 < arrived_unix_ns <= left_unix_ns < 2**63 else None
