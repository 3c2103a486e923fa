"""`wdmoe-bs serve`: what the command adds to `http_api` and `serving`."""

import asyncio
import logging
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from bs_coordinator.errors import ServeError
from common.errors import KeyFileError
from common.private_files import read_private
from common.systemd import notify
from wire.broker_url import is_loopback

if TYPE_CHECKING:
    from bs_coordinator.base_station import BaseStation

log = logging.getLogger("wdmoe-bs")

_GRACE_S = 5


def serve_station(
    station: "BaseStation", *, host: str, port: int, max_live: int, max_waiting: int, api_key: str | None,
    layer_timeout_s: float,
) -> None:  # fmt: skip
    """Serve HTTP until a signal ends it.

    Raises:
        ServeError: the port can't be had.
    """
    import uvicorn

    from bs_coordinator.engine.scheduler import Scheduler
    from bs_coordinator.http.answer_server import AnswerServer
    from bs_coordinator.http.openai_api import http_app

    server = AnswerServer(
        Scheduler(station.model, max_live=max_live),
        station.new_sequence,
        max_waiting=max_waiting,
        dispatcher=station.dispatcher,
    )
    app = http_app(
        server, station.tokenizer, model=station.manifest.source.name, api_key=api_key, stall_s=2 * layer_timeout_s
    )

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                notify("READY=1")
                log.info("answers at http://%s:%d/v1", host, port)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # First, so that answers under way end with a word of it, and not with their connections.
            await asyncio.to_thread(server.stop)
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app, host=host, port=port, log_config=None, log_level="warning", access_log=False,
        timeout_graceful_shutdown=_GRACE_S,
    )  # fmt: skip
    server.start()
    try:
        Server(config).run()
    except SystemExit:  # what uvicorn does when it can't listen
        raise ServeError(f"can't listen on {host}:{port}: is the port taken? say another --port") from None
    except KeyboardInterrupt:  # uvicorn gives the signal back when it is done: how a service ends
        log.info("stopped")
    finally:
        server.stop()


def read_api_key(key_file: Path | None, *, host: str) -> str | None:
    """The key that callers must have, so that not just anybody in the network can use the model.

    Raises:
        ServeError: beyond loopback without a key.
        KeyFileError: the file can't be read, or holds no key that a caller could send.
    """
    if key_file is None and not is_loopback(host):
        raise ServeError(f"--host {host} can be reached from outside: say --api-key-file, and put TLS in front of it")
    if key_file is None:
        return None
    key = read_private(key_file).decode("ascii", "replace").strip()
    if not key:
        raise KeyFileError(f"the API key file {key_file} is empty")
    if not (key.isascii() and key.isprintable()):
        raise KeyFileError(f"{key_file} holds no API key: that is one line of printable ASCII characters")
    return key
