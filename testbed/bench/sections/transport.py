"""Round trips of messages: our frames over MQTT compared with the same bytes over plain TCP."""

import multiprocessing
import os
import select
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext

import numpy as np

from bs_coordinator.broker.processes import LOOPBACK, open_broker
from common.files import atomic_write
from testbed.bench.rows import Result, Row, Settings, Skipped, in_turns
from testbed.bench.system import why_not
from wire import frames
from wire.broker_address import BrokerAddress
from wire.frames import ExpertRows, NodeDurations, RequestId, ResultFrame, WorkFrame
from wire.tensors import Array, WireDtype
from wire.transport import Transport
from wire.transports import connect

HIDDEN = 4096
"""Hidden size of Mixtral: one token in fp16 has 8 KiB."""
_THERE, _BACK = "wdmoe/v1/bench/nodes/node/work", "wdmoe/v1/bench/results/node"
SIZES = ((1, 512), (1, HIDDEN), (8, HIDDEN), (64, HIDDEN), (512, HIDDEN))
"""Tokens and hidden size: 1 KiB to 4 MiB."""
LINK_MBPS, LINK_RTT_MS = 50, 2
_LOOPBACK_MS = 0.3
_LINK_RATIO, _LARGE_LINK_RATIO = 1.12, 1.1
_NODE = "node"


def measure(settings: Settings) -> Iterator[Result]:
    """Yield rows for 1 KiB to 4 MiB, on loopback and on an emulated link."""
    with open_broker(settings.broker) as address, echoes(address, LOOPBACK) as (transport, plain):
        for tokens, hidden in SIZES:
            yield compare(settings, f"loopback, {settings.broker}", transport, plain, tokens, hidden)
    if why := why_not():
        yield Skipped("round trips on an emulated link", why)
        return
    with link(settings) as (transport, plain):
        for tokens, hidden in SIZES:
            target = _LINK_RATIO if tokens == 1 else _LARGE_LINK_RATIO
            where = f"{LINK_MBPS} Mbit/s, {LINK_RTT_MS} ms"
            yield compare(settings, where, transport, plain, tokens, hidden, target)


@contextmanager
def link(settings: Settings) -> Iterator[tuple[Transport, socket.socket]]:
    """MQTT and plain TCP over an emulated link; this thread is in the base station's namespace meanwhile."""
    from testbed.network import namespaces
    from testbed.network.daemon import BASE_STATION
    from testbed.network.emulated import emulated

    spec = settings.folder / "link.yaml"
    rates = f"down_mbps: {LINK_MBPS}, up_mbps: {LINK_MBPS}, delay_ms: {LINK_RTT_MS / 2:g}"
    text = f"name: link{os.getpid()}\nnodes: [{_NODE}]\nprofiles: {{link: {{default: {{{rates}}}}}}}\n"
    with atomic_write(spec) as file:
        file.write(text.encode())
    with (
        emulated(spec) as network,
        namespaces.inside(namespaces.namespace(network.spec.name, BASE_STATION)),
        open_broker("mosquitto", host=network.bs_address) as address,
        echoes(address, network.bs_address, namespaces.namespace(network.spec.name, _NODE)) as ways,
    ):
        yield ways


def compare(
    settings: Settings,
    where: str,
    transport: Transport,
    plain: socket.socket,
    tokens: int,
    hidden: int,
    target: float | None = None,
) -> Row:
    """Measure round trips of a [tokens, hidden] tensor, split into frames as the dispatcher does."""
    x = np.random.default_rng(0).standard_normal((tokens, hidden), np.float32)
    most = frames.max_tokens(hidden, WireDtype.FP16)
    parts = [x[i : i + most] for i in range(0, tokens, most)]
    pairs = [(len(_work(part)), len(_result(part))) for part in parts]
    # The same pieces; each is answered as soon as it has arrived.
    there = [up.to_bytes(4, "little") + down.to_bytes(4, "little") + bytes(up) for up, down in pairs]
    back_bytes = sum(down for _, down in pairs)

    def over_mqtt() -> None:
        for part in parts:
            transport.publish(_THERE, _work(part))
        for _ in parts:
            message = transport.receive(30.0)
            assert message is not None  # noqa: S101 - a lost message ends the benchmark
            frames.decode(message.payload)

    def over_tcp() -> None:
        exchange(plain, there, back_bytes)

    slow = back_bytes > 1 << 20
    ours, floor = in_turns(over_mqtt, over_tcp, settings.samples // (10 if slow else 1), warm_up=5 if slow else 20)
    size = tokens * hidden * 2
    text = f"{size >> 10} KiB" if size < 1 << 20 else f"{size >> 20} MiB"
    parameters = {"where": where, "tokens": tokens, "hidden": hidden, "frames": len(parts), "bytes": pairs}
    if where.startswith("loopback") and (tokens, hidden) == (1, HIDDEN):
        parameters["wanted_ms"] = _LOOPBACK_MS
    return Row(f"round trip {text}, {where}", "same bytes, plain TCP", ours, floor, target, parameters)


def _work(x: Array) -> bytes:
    n = len(x)
    slices = [ExpertRows(0, np.arange(n, dtype=np.uint32), np.ones(n, np.float32))]
    return frames.encode(WorkFrame(RequestId(1, 1), 0, 0, slices, x, WireDtype.FP16))


def _result(x: Array) -> bytes:
    return frames.encode(ResultFrame(RequestId(1, 1), 0, x, WireDtype.FP16, NodeDurations()))


@contextmanager
def echoes(
    address: BrokerAddress, host: str, namespace: str | None = None
) -> Iterator[tuple[Transport, socket.socket]]:
    """Two processes that answer each message: one over the broker, one over plain TCP. Yields connections to both.

    Args:
        address: address of the broker.
        host: address of this process for plain TCP.
        namespace: network namespace of the two processes; None for this one.
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
            with plain, closing(connect(address, "bench-bs")) as transport:
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
        transport = connect(address, "bench-node")
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
    # Imported here because it needs Linux and pyroute2, unlike benchmarks on loopback.
    from testbed.network import namespaces

    return namespaces.inside(name)


def exchange(plain: socket.socket, pieces: Sequence[bytes], back_bytes: int) -> None:
    """Send pieces and receive `back_bytes` bytes at the same time, so neither direction waits for the other.

    Raises:
        TimeoutError: nothing could be sent or received for 60 s.
    """
    waiting = deque([memoryview(piece) for piece in pieces])
    scrap = bytearray(1 << 18)
    while waiting or back_bytes:
        ready, free, _ = select.select([plain], [plain] if waiting else [], [], 60.0)
        if free:
            sent = plain.send(waiting[0], socket.MSG_DONTWAIT)
            waiting[0] = waiting[0][sent:]
            if not waiting[0]:
                waiting.popleft()
        if ready:
            got = plain.recv_into(scrap, min(len(scrap), back_bytes))
            back_bytes -= got
        if not ready and not free:
            raise TimeoutError("the other side of the benchmark did not answer for 60 s")


def read_exactly(plain: socket.socket, size: int) -> bytes:
    """Read `size` bytes; empty if the other side has closed the connection."""
    data = bytearray(size)
    view = memoryview(data)
    while view:
        got = plain.recv_into(view)
        if got == 0:
            return b""
        view = view[got:]
    return bytes(data)
