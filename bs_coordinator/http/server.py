"""A base station behind an HTTP port, until a signal ends it."""

import asyncio
import logging
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from bs_coordinator.config import ServeConfig
from bs_coordinator.engine.scheduler import Scheduler
from bs_coordinator.errors import ServeError
from bs_coordinator.http.answer_server import AnswerServer
from bs_coordinator.http.connections import LimitedProtocol
from bs_coordinator.http.openai_api import http_app
from common.errors import KeyFileError
from common.private_files import read_private
from common.systemd import notify
from wire.broker_address import is_loopback

if TYPE_CHECKING:
    from bs_coordinator.base_station import BaseStation

log = logging.getLogger("wdmoe-bs")

_GRACE_S = 5
_STALLED_LAYERS = 2
"""A server without progress for so many layer timeouts is not healthy: some layer has missed its deadline."""


def serve_station(
    station: "BaseStation", config: ServeConfig, *, api_key: str | None, layer_timeout_s: float
) -> None:  # fmt: skip
    """Serve HTTP until a signal ends it.

    Args:
        api_key: that callers must send; None lets every caller in.

    Raises:
        ServeError: the port is taken, or the address is not this machine's.
    """
    server = AnswerServer(
        Scheduler(station.model, max_live=config.max_live),
        station.new_sequence,
        max_waiting=config.max_waiting,
        dispatcher=station.dispatcher,
    )
    app = http_app(
        server, station.tokenizer, model=station.manifest.source.name, api_key=api_key,
        stall_s=_STALLED_LAYERS * layer_timeout_s, max_positions=station.model.trunk.max_positions,
        hosts=allowed_hosts(config.host, api_key), origin=config.cors_origin,
    )  # fmt: skip
    settings = uvicorn.Config(
        app, host=config.host, port=config.port, log_config=None, log_level="warning", access_log=False,
        timeout_graceful_shutdown=_GRACE_S, http=LimitedProtocol,
    )  # fmt: skip
    server.start()
    try:
        _Uvicorn(settings, server).run()
    except SystemExit:  # from uvicorn when it can't listen
        raise ServeError(
            f"can't listen on {config.host}:{config.port}: the port may be taken; choose another --port"
        ) from None
    except KeyboardInterrupt:  # uvicorn raises the signal again after its shutdown
        log.info("stopped")
    finally:
        server.stop()


class _Uvicorn(uvicorn.Server):
    """Reports when it is ready, and ends running answers before it closes their connections."""

    def __init__(self, config: uvicorn.Config, server: AnswerServer) -> None:
        super().__init__(config)
        self._server = server

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            notify("READY=1")
            log.info("answers at http://%s:%d/v1", self.config.host, self.config.port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # First, so that the callers of running answers read why they end.
        await asyncio.to_thread(self._server.stop)
        await super().shutdown(sockets)


def allowed_hosts(host: str, api_key: str | None) -> list[str]:
    """Names under which requests may ask for a server that listens on `host`; `*` for any.

    Without a key, only names of this machine: a web page whose name is made to resolve to loopback (DNS rebinding)
    would be of the same origin as the server. A key is unknown to such a page.
    """
    if api_key is not None or not is_loopback(host):
        return ["*"]
    return ["localhost", "127.0.0.1", "::1", "[::1]", host]


def read_api_key(key_file: Path | None, *, host: str) -> str | None:
    """The API key that callers must send; None on loopback without a key file.

    Raises:
        ServeError: `host` is beyond loopback, and there is no key file.
        KeyFileError: the file can't be read, or holds no key that a caller could send.
    """
    if key_file is None and not is_loopback(host):
        raise ServeError(
            f"--host {host} can be reached from other machines: add --api-key-file, and put TLS in front of it"
        )
    if key_file is None:
        return None
    key = read_private(key_file).decode("ascii", "replace").strip()
    if not key:
        raise KeyFileError(f"the API key file {key_file} is empty")
    if not (key.isascii() and key.isprintable()):
        raise KeyFileError(f"{key_file} holds no API key: write one line of printable ASCII characters")
    return key
