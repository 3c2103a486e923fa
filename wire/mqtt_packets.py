"""MQTT 3.1.1 control packets as bytes: what our client sends, and what it takes from a broker. Coding only, no I/O.

Just the part of the protocol that `wire.mqtt` needs: clean sessions, QoS 0 and 1. Section numbers are those of the
OASIS standard, MQTT Version 3.1.1.
"""

import enum
import struct
from collections.abc import Iterator
from typing import NamedTuple

MAX_PACKET_BYTES = 4 << 20
"""No broker has a reason to send us a larger one: frames end at 2 MiB."""
_FIRST_BYTES = 64 << 10
_SHORT = struct.Struct(">H")
_PACKET_ID = struct.Struct(">BBH")
_MOST_LENGTH_BYTES = 4
PING = b"\xc0\x00"
DISCONNECT = b"\xe0\x00"


class Type(enum.IntEnum):
    """Control packets that a broker sends (section 2.2.1)."""

    CONNACK = 2
    PUBLISH = 3
    PUBACK = 4
    SUBACK = 9
    PINGRESP = 13


class Publish(NamedTuple):
    """A message.

    Attributes:
        packet_id: to be acknowledged, for QoS 1; 0 for QoS 0.
    """

    topic: str
    payload: bytes
    retained: bool
    packet_id: int


class ConnAck(NamedTuple):
    """Whether we are connected: 0, or why not (table 3.1)."""

    code: int


class PubAck(NamedTuple):
    """A message with QoS 1 has arrived."""

    packet_id: int


class SubAck(NamedTuple):
    """A subscription was taken, or refused."""

    packet_id: int
    granted: bool


class PingResp(NamedTuple):
    """The broker lives."""


Packet = Publish | ConnAck | PubAck | SubAck | PingResp


def connect(
    client_id: str,
    *,
    keepalive_s: int,
    will: tuple[str, bytes] | None = None,
    user: str | None = None,
    password: str | None = None,
) -> bytes:
    """CONNECT with a clean session (section 3.1).

    Args:
        will: topic and payload, published with QoS 1 and retained when we vanish.
    """
    flags = 0x02
    fields = [_text(client_id)]
    if will:
        flags |= 0x04 | 0x08 | 0x20
        fields += [_text(will[0]), _data(will[1])]
    if user is not None:
        flags |= 0x80
        fields.append(_text(user))
        if password is not None:
            flags |= 0x40
            fields.append(_text(password))
    head = _text("MQTT") + struct.pack(">BBH", 4, flags, keepalive_s)
    return _packet(0x10, head + b"".join(fields))


def subscribe(packet_id: int, topic_filter: str, qos: int) -> bytes:
    """SUBSCRIBE to one filter (section 3.8)."""
    return _packet(0x82, _SHORT.pack(packet_id) + _text(topic_filter) + bytes([qos]))


def publish_head(topic: bytes, payload_bytes: int, *, retain: bool = False, packet_id: int = 0) -> bytes:
    """What comes before the payload of a PUBLISH (section 3.3); QoS 1 with a packet id, else 0.

    Args:
        topic: encoded.
    """
    length = 2 + len(topic) + payload_bytes + (2 if packet_id else 0)
    first = 0x30 | (0x02 if packet_id else 0) | retain
    tail = _SHORT.pack(packet_id) if packet_id else b""
    return b"".join((bytes([first]), _length(length), _SHORT.pack(len(topic)), topic, tail))


def puback(packet_id: int) -> bytes:
    """PUBACK (section 3.4)."""
    return _PACKET_ID.pack(0x40, 2, packet_id)


class Reader:
    """Packets out of a stream of bytes.

    Bytes are received straight into `space()`, so that a payload is copied once on its way. The buffer grows to what
    the largest packet so far needed.
    """

    def __init__(self) -> None:
        self._buffer = bytearray(_FIRST_BYTES)
        self._start = self._end = 0
        self._topics: dict[bytes, str] = {}

    def space(self) -> memoryview:
        """Where the next bytes go; never empty. Let go of it before `received`."""
        return memoryview(self._buffer)[self._end :]

    def received(self, count: int) -> Iterator[Packet]:
        """Take in the first `count` bytes of `space()`; the packets that are complete with them.

        Raises:
            ValueError: this is no MQTT, or a packet is too large.
        """
        self._end += count
        while (found := self._next()) is not None:
            yield found

    def _next(self) -> Packet | None:
        buffer, start, end = self._buffer, self._start, self._end
        if start == end:
            return None
        body = length = shift = 0
        for i in range(start + 1, min(end, start + 1 + _MOST_LENGTH_BYTES)):
            length |= (buffer[i] & 0x7F) << shift
            shift += 7
            if buffer[i] < 0x80:
                body = i + 1
                break
        if not body:
            if end - start > _MOST_LENGTH_BYTES:
                raise ValueError("a packet's length has more than four bytes")
            self._make_room(1 + _MOST_LENGTH_BYTES)
            return None
        if length > MAX_PACKET_BYTES:
            raise ValueError(f"a packet of {length} bytes exceeds {MAX_PACKET_BYTES}")
        stop = body + length
        if stop > end:
            self._make_room(stop - start)
            return None
        self._start = stop
        if stop == end:
            self._start = self._end = 0
        return self._decode(buffer[start], body, stop)

    def _make_room(self, wanted: int) -> None:
        """Let a packet of `wanted` bytes from `_start` fit."""
        if self._start + wanted <= len(self._buffer):
            return
        rest = self._buffer[self._start : self._end]
        if wanted > len(self._buffer):
            self._buffer = bytearray(wanted)
        self._buffer[: len(rest)] = rest
        self._start, self._end = 0, len(rest)

    def _decode(self, first: int, body: int, stop: int) -> Packet:
        kind = first >> 4
        if kind == Type.PUBLISH:
            return self._publish(first, body, stop)
        data = bytes(self._buffer[body:stop])
        if kind == Type.PINGRESP and not data:
            return PingResp()
        if kind == Type.CONNACK and len(data) == 2:
            return ConnAck(data[1])
        if kind == Type.PUBACK and len(data) == 2:
            return PubAck(_SHORT.unpack(data)[0])
        if kind == Type.SUBACK and len(data) == 3:
            return SubAck(_SHORT.unpack_from(data)[0], data[2] < 0x80)
        raise ValueError(f"a packet of type {kind} and {len(data)} bytes was not expected")

    def _publish(self, first: int, body: int, stop: int) -> Publish:
        buffer, qos = self._buffer, first >> 1 & 3
        payload = body + 2
        if payload <= stop:
            payload += _SHORT.unpack_from(buffer, body)[0]
        topic_end = payload
        payload += 2 if qos else 0
        if payload > stop or qos > 1:
            raise ValueError("a message has a quality that nobody asked for, or ends within its header")
        packet_id = _SHORT.unpack_from(buffer, topic_end)[0] if qos else 0
        # A client hears few topics, again and again.
        raw = bytes(buffer[body + 2 : topic_end])
        topic = self._topics.get(raw)
        if topic is None:
            # What is no UTF-8 gets a topic that nobody subscribes to, and is dropped as such.
            topic = raw.decode(errors="replace")
            if len(self._topics) < 1024:
                self._topics[raw] = topic
        return Publish(topic, bytes(memoryview(buffer)[payload:stop]), bool(first & 1), packet_id)


def _packet(first: int, body: bytes) -> bytes:
    return bytes([first]) + _length(len(body)) + body


def _length(length: int) -> bytes:
    """Seven bits a byte, the lowest first (section 2.2.3)."""
    digits = bytearray()
    while True:
        length, digit = length >> 7, length & 0x7F
        digits.append(digit | 0x80 if length else digit)
        if not length:
            return bytes(digits)


def _text(text: str) -> bytes:
    return _data(text.encode())


def _data(data: bytes) -> bytes:
    return _SHORT.pack(len(data)) + data
