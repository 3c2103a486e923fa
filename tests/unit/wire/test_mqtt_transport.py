"""Messages over MQTT arrive whole and in order, whichever way through the client they take."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from paho.mqtt.client import Client
from paho.mqtt.enums import MQTTErrorCode

from wire import mqtt_client, transports
from wire.broker_address import BrokerAddress
from wire.broker_url import parse_broker_url
from wire.errors import BrokerError
from wire.transport import Transport

_CONNACK = bytes([0x20, 2, 0, 0])
_PING_RESPONSE = bytes([0xD0, 0])


def _receive(transport: Transport) -> tuple[str, bytes, bool]:
    message = transport.receive(30.0)
    assert message is not None
    return message.topic, message.payload, message.retained


def _publish_packet(topic: bytes, payload: bytes, *, first: int = 0x30) -> bytes:
    """A packet as MQTT 3.1.1 describes it (3.3), for lengths below 16,384."""
    body = len(topic).to_bytes(2, "big") + topic + payload
    length = bytes([len(body)]) if len(body) < 128 else bytes([len(body) % 128 | 128, len(body) // 128])
    return bytes([first]) + length + body


@contextmanager
def _scripted(script: Callable[[socket.socket], None]) -> Iterator[BrokerAddress]:
    """A broker that accepts one client and then does what the script says."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(30.0)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.recv(1024)
            connection.sendall(_CONNACK)
            script(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield parse_broker_url(f"mqtt://127.0.0.1:{listener.getsockname()[1]}")
        thread.join(30.0)
        assert not thread.is_alive()


def test_the_installed_paho_fits() -> None:
    # If this fails, paho has changed and messages take the long way: compare `ShortcutClient` with paho's new code.
    assert mqtt_client.paho_fits()


def test_a_paho_with_other_methods_does_not_fit() -> None:
    class OtherParameters(Client):
        def _sock_recv(self, bufsize: int, flags: int = 0) -> bytes:
            raise NotImplementedError

    class ReadsOtherwise(Client):
        def _packet_read(self) -> MQTTErrorCode:
            raise NotImplementedError

    for other in (OtherParameters, ReadsOtherwise):
        assert not mqtt_client.paho_fits(other)


@pytest.fixture(params=["short way", "paho alone"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The way of messages of QoS 0 through the client."""
    if request.param == "paho alone":
        monkeypatch.setattr(mqtt_client, "paho_fits", lambda: False)
    return str(request.param)


@pytest.mark.usefixtures("way")
def test_messages_of_all_sizes_arrive_in_order_whatever_their_qos(broker: BrokerAddress) -> None:
    sender, receiver = (transports.connect(broker, f"mqtt-test-{name}") for name in ("sender", "receiver"))
    receiver.subscribe("mqtt-test/+", qos=1)
    sizes = (0, 1, 111, 112, 113, 16_369, 16_370, 16_371, 70_000, 300_000, 2_500_000)
    for size in sizes:
        sender.publish("mqtt-test/a", bytes(range(250)) * (size // 250) + bytes(size % 250))
        assert _receive(receiver)[1] == bytes(range(250)) * (size // 250) + bytes(size % 250)
    with sender.in_one_segment():
        for number in range(300):
            sender.publish("mqtt-test/b", b"%d" % number, qos=number % 7 == 0)
    assert [_receive(receiver) for _ in range(300)] == [("mqtt-test/b", b"%d" % number, False) for number in range(300)]
    sender.publish_confirmed("mqtt-test/kept", b"kept", retain=True)
    assert _receive(receiver) == ("mqtt-test/kept", b"kept", False)
    late = transports.connect(broker, "mqtt-test-late")
    late.subscribe("mqtt-test/kept")
    assert _receive(late) == ("mqtt-test/kept", b"kept", True)
    sender.publish_confirmed("mqtt-test/kept", b"", retain=True)
    for transport in (sender, receiver, late):
        transport.close()


@pytest.mark.usefixtures("way")
def test_packets_may_arrive_in_any_pieces() -> None:
    messages = [(f"t/{number}", bytes(number % 251 for _ in range(number))) for number in (0, 3, 130, 900, 5)]
    packets = [_publish_packet(topic.encode(), payload) for topic, payload in messages]
    stream = _PING_RESPONSE.join(packets) + _publish_packet(b"old", b"x", first=0x31)

    def script(connection: socket.socket) -> None:
        for byte in stream:
            connection.sendall(bytes([byte]))
        connection.sendall(stream)
        connection.recv(1024)

    with _scripted(script) as address:
        transport = transports.connect(address, "c")
        expected = [*((topic, payload, False) for topic, payload in messages), ("old", b"x", True)]
        assert [_receive(transport) for _ in range(2 * len(expected))] == 2 * expected
        transport.close()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    "rubbish",
    [b"", bytes([0x30, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF]), b"\x30\x04\0\x09ab", b"\x30\x01\0"],
    ids=["it hangs up", "a length of five bytes", "a topic longer than its packet", "half a topic's length"],
)
def test_what_breaks_the_connection_is_an_error(rubbish: bytes) -> None:
    def script(connection: socket.socket) -> None:
        connection.sendall(_publish_packet(b"t", b"1"))
        assert connection.recv(1024) == _publish_packet(b"go", b"on")
        connection.sendall(rubbish)
        if rubbish:
            connection.recv(1024)

    with _scripted(script) as address:
        transport = transports.connect(address, "c")
        assert _receive(transport) == ("t", b"1", False)
        transport.publish("go", b"on")
        with pytest.raises(BrokerError, match="lost the connection"):
            transport.receive(30.0)
        transport.close()


@pytest.mark.usefixtures("way")
def test_a_topic_with_a_wildcard_is_refused(broker: BrokerAddress) -> None:
    transport = transports.connect(broker, "mqtt-test-wildcard")
    for topic in ("", "a/+", "#"):
        with pytest.raises(ValueError, match="topic"):
            transport.publish(topic, b"")
    transport.close()


@pytest.mark.usefixtures("way")
def test_a_connection_lost_within_one_segment_is_a_broker_error() -> None:
    def publish_all() -> None:
        with transport.in_one_segment():
            while True:
                transport.publish("t", bytes(1000))

    with _scripted(lambda connection: None) as address:
        transport = transports.connect(address, "c")
        with pytest.raises(BrokerError, match="lost the connection"):
            publish_all()
        transport.close()
