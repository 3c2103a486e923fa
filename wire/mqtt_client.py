"""paho-mqtt's client with a short way for messages of QoS 0, on which decoding waits.

paho reads a packet's first bytes one by one from the socket, and makes several objects and takes several locks per
message. Each layer of a token needs four messages one after the other, in processes that have just been woken and
whose caches are cold. Here such a message is one read or one write. All other packets go through paho. It keeps the
connection alive by what it reads and writes itself: while messages arrive only on the short way, it pings the broker in
every keep-alive interval.

Two of paho's methods that this needs are private: nothing public takes bytes that were read already, or a packet that
is ready to send. With a paho that lacks them (`paho_fits`) everything goes through its public methods, at its speed.
"""

import functools
import inspect
import ssl
from collections.abc import Callable
from typing import Any

from paho.mqtt.client import PUBLISH, Client, MQTTMessageInfo
from paho.mqtt.enums import MQTTErrorCode

_READ_BYTES = 1 << 18
_MOST_SHORT_BYTES = 1 << 21
"""Larger messages take so long that the short way would save nothing."""


def paho_fits(client: type[Client] = Client) -> bool:
    """Whether paho reads only with `_sock_recv`, queues packets with `_packet_queue`, and both take what we give.

    So it is in 2.1 and 2.2.
    """
    wanted = {
        "_packet_read": ("_sock_recv", ["self", "bufsize"]),
        "_send_publish": ("_packet_queue", ["self", "command", "packet", "mid", "qos", "info"]),
    }
    for caller, (name, parameters) in wanted.items():
        method, calls = getattr(client, name, None), getattr(getattr(client, caller, None), "__code__", None)
        if method is None or calls is None or name not in calls.co_names:
            return False
        if list(inspect.signature(method).parameters) != parameters:
            return False
    return True


class ShortcutClient(Client):
    """A client that its owner's thread drives, with `send` and `read` beside paho's own methods.

    `read` reads from the socket first, and paho reads what `read` leaves to it (in place of `_sock_recv`). `send` hands
    a ready packet to paho's queue (`_packet_queue`), where it keeps its place among all other packets.
    """

    def __init__(self, *args: Any, deliver: Callable[[bytes, bytes], None], **options: Any) -> None:
        """Create a client as paho does.

        Args:
            deliver: takes the topic and the payload of a message of QoS 0 that was not retained. With a paho that does
                not fit, `on_message` gets these as well.
        """
        super().__init__(*args, **options)
        self._deliver = deliver
        self._chunk = memoryview(bytearray(_READ_BYTES))
        self._unfinished = bytearray()
        self._for_paho = b""
        self._end: OSError | None = None
        self._sent = MQTTMessageInfo(0)
        self._short = paho_fits()
        if self._short:
            self._sock_recv = self._hand_over  # type: ignore[method-assign]

    def send(self, topic: str, payload: bytes) -> MQTTErrorCode:
        """Publish a message with QoS 0 that the broker does not retain."""
        if not self._short or len(payload) > _MOST_SHORT_BYTES:
            return self.publish(topic, payload).rc
        if self.socket() is None:
            return MQTTErrorCode.MQTT_ERR_NO_CONN
        named = _topic_field(topic)
        packet = b"".join((bytes([PUBLISH]), _length_field(len(named) + len(payload)), named, payload))
        return self._packet_queue(PUBLISH, packet, 0, 0, self._sent)

    def read(self) -> MQTTErrorCode:
        """Read once from the socket, and take in all packets that are complete by then."""
        if not self._short:
            return self.loop_read()
        sock: Any = self.socket()
        if sock is None:
            return MQTTErrorCode.MQTT_ERR_NO_CONN
        try:
            count = sock.recv_into(self._chunk)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return MQTTErrorCode.MQTT_ERR_SUCCESS
        except OSError as error:
            self._end = error
            return self.loop_read()
        if not count:
            self._end = ConnectionError("the broker closed the connection")
            return self.loop_read()
        if not self._unfinished:
            taken, rc = self._take(self._chunk[:count])
            self._unfinished += self._chunk[taken:count]
            return rc
        self._unfinished += self._chunk[:count]
        with memoryview(self._unfinished) as view:
            taken, rc = self._take(view)
        del self._unfinished[:taken]
        return rc

    def _take(self, view: memoryview) -> tuple[int, MQTTErrorCode]:
        """Take in the packets in `view`, and return the bytes that they have together."""
        start = 0
        while (body := _body(view, start)) is not None:
            first, end = body
            payload = first + 2 + (view[first] << 8 | view[first + 1]) if first + 2 <= end else end + 1
            if view[start] == PUBLISH and payload <= end:
                self._deliver(bytes(view[first + 2 : payload]), bytes(view[payload:end]))
            else:
                self._for_paho = bytes(view[start:end])
                while self._for_paho:
                    rc = self.loop_read()
                    if rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
                        return end, rc
            start = end
        return start, MQTTErrorCode.MQTT_ERR_SUCCESS

    def _hand_over(self, bufsize: int) -> bytes:
        if self._end is not None:
            raise self._end
        if not self._for_paho:
            raise BlockingIOError
        part, self._for_paho = self._for_paho[:bufsize], self._for_paho[bufsize:]
        return part


def _body(view: memoryview, start: int) -> tuple[int, int] | None:
    """Where the body of the packet at `start` begins and ends; None if the packet is not complete.

    A length that is not valid is left to paho, with all bytes that are there.
    """
    length = shift = 0
    for position in range(start + 1, min(start + 5, len(view))):
        byte = view[position]
        length |= (byte & 0x7F) << shift
        if byte < 0x80:
            end = position + 1 + length
            return (position + 1, end) if end <= len(view) else None
        shift += 7
    return (start, len(view)) if len(view) >= start + 5 else None


def _length_field(length: int) -> bytes:
    field = bytearray()
    while length > 0x7F:
        field.append(length & 0x7F | 0x80)
        length >>= 7
    field.append(length)
    return bytes(field)


@functools.lru_cache(maxsize=4096)
def _topic_field(topic: str) -> bytes:
    encoded = topic.encode()
    if not encoded or len(encoded) > 0xFFFF or "+" in topic or "#" in topic:
        raise ValueError(f"'{topic}' is not a topic to publish on")
    return len(encoded).to_bytes(2, "big") + encoded
