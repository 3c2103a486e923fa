"""Connections that send half a request, and more of them than are allowed."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from bs_coordinator.broker.processes import free_port
from bs_coordinator.http.connections import LimitedProtocol, _network
from tests.waiting import PATIENCE_S

REQUEST = b"GET /%s HTTP/1.1\r\nHost: h\r\n\r\n"


class _Small(LimitedProtocol):
    max_connections = 3
    head_s = 0.2


class _FewPerAddress(LimitedProtocol):
    max_connections = 100
    max_per_address = 4


class _Gate:
    def __init__(self) -> None:
        self.arrived, self.opened = asyncio.Semaphore(0), asyncio.Event()


def _play(protocol: type[LimitedProtocol], scene: Callable[[int, "_Gate"], Awaitable[None]]) -> None:
    """Run a scene with a server: its port, and the gate at which requests of `/wait` wait."""

    async def run() -> None:
        gate = _Gate()

        async def here(request: Request) -> PlainTextResponse:
            if request.url.path == "/wait":
                gate.arrived.release()
                await gate.opened.wait()
            return PlainTextResponse("here")

        app = Starlette(routes=[Route("/{name}", here)])
        port = free_port()
        server = uvicorn.Server(uvicorn.Config(app, port=port, http=protocol, log_config=None, lifespan="off"))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        await scene(port, gate)
        gate.opened.set()
        server.should_exit = True
        await serving

    asyncio.run(asyncio.wait_for(run(), PATIENCE_S))


async def _is_answered(port: int) -> bool:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(REQUEST % b"x")
        return (await reader.readuntil(b"here")).startswith(b"HTTP/1.1 200")
    except (ConnectionError, asyncio.IncompleteReadError):
        return False
    finally:
        writer.close()


def test_half_sent_heads_are_closed_and_others_are_answered() -> None:
    async def scene(port: int, gate: _Gate) -> None:
        half = [await asyncio.open_connection("127.0.0.1", port) for _ in range(6)]
        for _, writer in half:
            writer.write(b"GET / HT")
        for reader, writer in half:
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):
            writer.write(REQUEST % b"x")
            assert (await reader.readuntil(b"here")).startswith(b"HTTP/1.1 200")
        writer.close()

    _play(_Small, scene)


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: h\r\n", REQUEST % b"x"])
def test_connections_without_a_request_make_room_for_others_of_their_address(sent: bytes) -> None:
    async def scene(port: int, gate: _Gate) -> None:
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(40)]
        for _, writer in held:
            writer.write(sent)  # nothing, half a head, or a request after which the connection stays open
        for _ in range(6):
            assert await _is_answered(port)
        for _, writer in held:
            writer.close()

    _play(_FewPerAddress, scene)


def test_where_all_connections_of_an_address_have_requests_further_ones_are_closed() -> None:
    async def scene(port: int, gate: _Gate) -> None:
        running = [await asyncio.open_connection("127.0.0.1", port) for _ in range(4)]
        for _, writer in running:
            writer.write(REQUEST % b"wait")
        for _ in running:
            await gate.arrived.acquire()
        assert not await _is_answered(port)
        gate.opened.set()
        for reader, writer in running:
            assert (await reader.readuntil(b"here")).startswith(b"HTTP/1.1 200")
            writer.close()
        assert await _is_answered(port)

    _play(_FewPerAddress, scene)


def test_one_address_is_one_ipv4_address_or_one_ipv6_network() -> None:
    assert _network("192.0.2.1") == _network("::ffff:192.0.2.1") != _network("192.0.2.2")
    assert _network("2001:db8:1:2::1") == _network("2001:db8:1:2:ffff::9") != _network("2001:db8:1:3::1")
    assert _network("fe80::1%eth0") == _network("fe80::2%eth0")
    assert _network("") == ""
