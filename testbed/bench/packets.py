"""Our frames as they pass network interfaces, with the kernel's time stamps. Linux, as root.

A packet socket gets a copy of every packet of its interface, with the wall clock's time at which it passed. The copies
wait in the kernel until `PacketLog.drain`: what is measured has no other process or thread beside it.
"""

import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from testbed.errors import NetworkError
from testbed.network.namespaces import inside
from wire import frames
from wire.errors import FrameError
from wire.frames import Frame

_ALL_PROTOCOLS = 3  # linux/if_ether.h: ETH_P_ALL, also what this machine sends
_TIMESTAMPNS, _RCVBUFFORCE = 35, 33  # asm-generic/socket.h
_PACKET, _STATISTICS, _IGNORE_OUTGOING = 263, 6, 23  # linux/if_packet.h
_BUFFER_BYTES = 64 << 20
_MOST_BYTES = 1 << 16
_TIME = struct.Struct("=qq")  # struct timespec of 64-bit machines
_IPV4, _TCP, _FRAGMENT = 4, 6, 0x3FFF
_PUBLISH = 3


class Sighting(NamedTuple):
    """A frame passed an interface; one of several packets did with its last.

    Attributes:
        where: name of the interface.
        at_ns: wall clock.
        topic: MQTT topic of the message around it.
    """

    where: str
    at_ns: int
    topic: str
    frame: Frame


class _Stream:
    """One direction of a TCP connection, as it passes one interface."""

    def __init__(self) -> None:
        self._next: int | None = None
        self._unfinished = b""

    def take(self, sequence: int, payload: bytes) -> Iterator[tuple[str, bytes]]:
        """Topic and payload of the MQTT messages that a segment completes.

        After a gap, the next segment is taken for the beginning of an MQTT packet: senders write packets whole.
        """
        if self._next is not None:
            known = (self._next - sequence) % (1 << 32)
            if known < 1 << 31:  # sent again, at least a part of it
                sequence, payload = self._next, payload[known:]
            else:
                self._unfinished = b""
        self._next = (sequence + len(payload)) % (1 << 32)
        data = self._unfinished + payload
        while packet := _mqtt_packet(data):
            kind, body, end = packet
            data = data[end:]
            if kind == _PUBLISH and len(body) >= 2:
                start = 2 + int.from_bytes(body[:2], "big")
                yield body[2:start].decode(errors="replace"), body[start:]
        self._unfinished = data if len(data) <= frames.MAX_FRAME_BYTES + _MOST_BYTES else b""


class Frames:
    """Puts packets together to frames. Pure."""

    def __init__(self) -> None:
        self._streams: dict[tuple[str, bytes], _Stream] = {}

    def take(self, where: str, at_ns: int, packet: bytes) -> Iterator[Sighting]:
        """The frames that a packet completes.

        Args:
            where: name of the interface.
            at_ns: when it passed.
            packet: from its IP header on.
        """
        if (segment := _tcp_segment(packet)) is None:
            return
        connection, sequence, payload = segment
        stream = self._streams.setdefault((where, connection), _Stream())
        for topic, message in stream.take(sequence, payload):
            try:
                yield Sighting(where, at_ns, topic, frames.decode(message))
            except FrameError:  # statuses and telemetry, which are no frames, and messages of QoS 1
                continue


class PacketLog:
    """Frames that pass several interfaces.

    Attributes:
        sightings: frames seen until the last `drain`.
    """

    def __init__(self, sockets: Sequence[tuple[str, socket.socket]]) -> None:
        self.sightings: list[Sighting] = []
        self._sockets = sockets
        self._frames = Frames()

    def drain(self) -> None:
        """Take in the packets that have passed since the last call.

        Raises:
            NetworkError: there were more than the kernel keeps.
        """
        for where, sock in self._sockets:
            while (received := _receive(sock)) is not None:
                self.sightings += self._frames.take(where, *received)
            _, dropped = struct.unpack("=II", sock.getsockopt(_PACKET, _STATISTICS, 8))
            if dropped:
                raise NetworkError(f"{dropped} packets at '{where}' were not seen: more than the kernel keeps")


@contextmanager
def packet_log(interfaces: Sequence[tuple[str, str, str]]) -> Iterator[PacketLog]:
    """Log what passes interfaces while the context lasts.

    Args:
        interfaces: a name, the network namespace and the interface of each.

    Raises:
        NetworkError: the kernel refuses.
    """
    sockets: list[tuple[str, socket.socket]] = []
    try:
        for where, namespace, interface in interfaces:
            with inside(namespace):
                sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM)
                sockets.append((where, sock))
                if interface == "lo":  # where every packet goes out and comes in
                    sock.setsockopt(_PACKET, _IGNORE_OUTGOING, 1)
                sock.setsockopt(socket.SOL_SOCKET, _TIMESTAMPNS, 1)
                sock.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, _BUFFER_BYTES)
                sock.bind((interface, _ALL_PROTOCOLS))
        yield PacketLog(sockets)
    except OSError as error:
        raise NetworkError(f"can't log packets: {error.strerror or error}") from None
    finally:
        for _, sock in sockets:
            sock.close()


def _receive(sock: socket.socket) -> tuple[int, bytes] | None:
    """When the next packet passed, and the packet; None if there is none."""
    try:
        packet, ancillary, _, _ = sock.recvmsg(_MOST_BYTES, 128, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return None
    seconds, ns = _TIME.unpack(next(data for _, kind, data in ancillary if kind == _TIMESTAMPNS))
    return seconds * 1_000_000_000 + ns, packet


def _tcp_segment(packet: bytes) -> tuple[bytes, int, bytes] | None:
    """Connection and direction, sequence number and payload of a TCP segment over IPv4; None for any other packet."""
    if len(packet) < 20 or packet[0] >> 4 != _IPV4 or packet[9] != _TCP:
        return None
    length, fragment = int.from_bytes(packet[2:4], "big"), int.from_bytes(packet[6:8], "big")
    header = 4 * (packet[0] & 0x0F)
    if header < 20 or not header + 20 <= length <= len(packet) or fragment & _FRAGMENT:
        return None
    payload = header + 4 * (packet[header + 12] >> 4)
    if not header + 20 <= payload < length:
        return None
    sequence = int.from_bytes(packet[header + 4 : header + 8], "big")
    return packet[12:20] + packet[header : header + 4], sequence, packet[payload:length]


def _mqtt_packet(data: bytes) -> tuple[int, bytes, int] | None:
    """Kind, body and end of the MQTT packet at the beginning of `data`; None if it is not complete."""
    length = 0
    for position, byte in enumerate(data[1:5]):
        length |= (byte & 0x7F) << 7 * position
        if byte < 0x80:
            start = position + 2
            end = start + length
            return (data[0] >> 4, data[start:end], end) if end <= len(data) else None
    return None
