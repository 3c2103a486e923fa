"""Connections that send half a request, and more of them than are allowed."""

import asyncio
import contextlib

import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from bs_coordinator.broker.processes import free_port
from bs_coordinator.http.connections import LimitedProtocol
from tests.waiting import PATIENCE_S


class _Small(LimitedProtocol):
    max_connections = 3
    head_s = 0.2


def test_half_sent_heads_are_closed_and_others_are_answered() -> None:
    async def scene() -> None:
        app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("here"))])
        port = free_port()
        server = uvicorn.Server(uvicorn.Config(app, port=port, http=_Small, log_config=None, lifespan="off"))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        half = [await asyncio.open_connection("127.0.0.1", port) for _ in range(6)]
        for _, writer in half:
            writer.write(b"GET / HT")
        for reader, writer in half:
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):
            writer.write(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
            assert (await reader.readuntil(b"here")).startswith(b"HTTP/1.1 200")
        writer.close()
        server.should_exit = True
        await serving

    asyncio.run(asyncio.wait_for(scene(), PATIENCE_S))
