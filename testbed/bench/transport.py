"""One message there and back: our frames over MQTT against the same bytes over plain TCP."""

import multiprocessing
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext

import numpy as np

from bs_coordinator.brokers import LOOPBACK, open_broker
from testbed.bench.rows import Row, Settings, in_turns
from wire import frames
from wire.broker_url import BrokerAddress
from wire.frames import ExpertSlice, NodeDurations, RequestId, ResultFrame, WorkFrame
from wire.mqtt import MqttTransport
from wire.tensors import Array, WireDtype

HIDDEN = 4096
"""Of Mixtral: one token in fp16 is 8 KiB."""
_THERE, _BACK = "wdmoe/v1/bench/nodes/node/work", "wdmoe/v1/bench/results/node"


def measure(settings: Settings) -> Iterator[Row]:
    """1, 8 and 512 KiB on loopback."""
    with open_broker(settings.broker) as address, echoes(address, LOOPBACK) as (transport, plain):
        for tokens, hidden in ((1, 512), (1, HIDDEN), (64, HIDDEN)):
            yield compare(settings, f"loopback, {settings.broker}", transport, plain, tokens, hidden)


def compare(
    settings: Settings,
    where: str,
    transport: MqttTransport,
    plain: socket.socket,
    tokens: int,
    hidden: int,
    target: float | None = None,
) -> Row:
    """A row of a [tokens, hidden] tensor there and back, cut into frames as the dispatcher cuts it."""
    x = np.random.default_rng(0).standard_normal((tokens, hidden), np.float32)
    most = frames.max_tokens(hidden, WireDtype.FP16)
    parts = [x[i : i + most] for i in range(0, tokens, most)]
    bytes_ = [sum(map(len, map(_work, parts))), sum(len(_result(part)) for part in parts)]
    there = bytes_[0].to_bytes(4, "little") + bytes_[1].to_bytes(4, "little") + bytes(bytes_[0])

    def over_mqtt() -> None:
        for part in parts:
            transport.publish(_THERE, _work(part))
        for _ in parts:
            message = transport.receive(30.0)
            assert message is not None  # noqa: S101 - a lost message ends the benchmark
            frames.decode(message.payload)

    def over_tcp() -> None:
        plain.sendall(there)
        read_exactly(plain, bytes_[1])

    slow = len(there) > 1 << 20
    ours, floor = in_turns(over_mqtt, over_tcp, settings.samples // (10 if slow else 1), warm_up=5 if slow else 20)
    size = tokens * hidden * 2
    text = f"{size >> 10} KiB" if size < 1 << 20 else f"{size >> 20} MiB"
    parameters = {"where": where, "tokens": tokens, "hidden": hidden, "frames": len(parts), "bytes": bytes_}
    return Row(f"round trip {text}, {where}", "same bytes, plain TCP", ours, floor, target, parameters)


def _work(x: Array) -> bytes:
    n = len(x)
    slices = [ExpertSlice(0, np.arange(n, dtype=np.uint32), np.ones(n, np.float32))]
    return frames.encode(WorkFrame(RequestId(1, 1), 0, 0, slices, x, WireDtype.FP16))


def _result(x: Array) -> bytes:
    return frames.encode(ResultFrame(RequestId(1, 1), 0, x, WireDtype.FP16, NodeDurations()))


@contextmanager
def echoes(
    address: BrokerAddress, host: str, namespace: str | None = None
) -> Iterator[tuple[MqttTransport, socket.socket]]:
    """Two processes that send back what they get: one over the broker, one over plain TCP.

    Args:
        host: where the plain one finds us.
        namespace: network namespace of these processes, if not ours.
    """
    context = multiprocessing.get_context("spawn")
    with socket.create_server((host, 0)) as server:
        server.settimeout(30.0)
        children = [
            context.Process(target=_echo_mqtt, args=(namespace, address), daemon=True),
            context.Process(target=_echo_tcp, args=(namespace, host, server.getsockname()[1]), daemon=True),
        ]
        for child in children:
            child.start()
        try:
            plain, _ = server.accept()
            plain.settimeout(60.0)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with plain, closing(MqttTransport(address, "bench-bs")) as transport:
                transport.subscribe(_BACK)
                ping = _work(np.zeros((1, 1), np.float32))
                while transport.receive(0.2) is None:  # until the other side has subscribed
                    transport.publish(_THERE, ping)
                while transport.receive(0.3):
                    pass
                yield transport, plain
        finally:
            for child in children:
                child.terminate()
                child.join(5)


def _echo_mqtt(namespace: str | None, address: BrokerAddress) -> None:
    with _in_namespace(namespace):
        transport = MqttTransport(address, "bench-node")
    transport.subscribe(_THERE)
    while True:
        if message := transport.receive(1.0):
            frame = frames.decode(message.payload)
            assert isinstance(frame, WorkFrame)  # noqa: S101
            transport.publish(_BACK, _result(frame.hidden))


def _echo_tcp(namespace: str | None, host: str, port: int) -> None:
    with _in_namespace(namespace):
        plain = socket.create_connection((host, port))
    with plain:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while header := read_exactly(plain, 8):
            read_exactly(plain, int.from_bytes(header[:4], "little"))
            plain.sendall(bytes(int.from_bytes(header[4:], "little")))


def _in_namespace(name: str | None) -> AbstractContextManager[None]:
    if name is None:
        return nullcontext()
    # Needs Linux and pyroute2, which loopback does not.
    from testbed.network import namespaces

    return namespaces.inside(name)


def read_exactly(plain: socket.socket, size: int) -> bytes:
    """That many bytes, or none when the other side has closed."""
    data = bytearray(size)
    view = memoryview(data)
    while view:
        got = plain.recv_into(view)
        if got == 0:
            return b""
        view = view[got:]
    return bytes(data)
