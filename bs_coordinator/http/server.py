"""A base station behind an HTTP port, until a signal ends it."""

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import uvicorn

from bs_coordinator.config import ServeConfig
from bs_coordinator.engine.scheduler import Scheduler
from bs_coordinator.http.access import ApiKey, allowed_hosts
from bs_coordinator.http.answer_server import AnswerServer
from bs_coordinator.http.connections import LimitedProtocol
from bs_coordinator.http.live_view import LiveView, model_facts
from bs_coordinator.http.metrics import MetricsSource
from bs_coordinator.http.observers import AnswerObserver
from bs_coordinator.http.openai_api import http_app
from bs_coordinator.http.request_log import request_log
from bs_coordinator.http.request_policy import NamedPolicy, RequestPolicies
from bs_coordinator.page.feed import LiveFeed
from common.systemd import notify

if TYPE_CHECKING:
    from bs_coordinator.base_station import BaseStation

log = logging.getLogger("wdmoe-bs")

_GRACE_S = 5
_STALLED_LAYERS = 2
"""A server without progress for so many layer timeouts is not healthy: some layer has missed its deadline."""


def serve_station(
    station: "BaseStation", config: ServeConfig, sockets: Sequence[socket.socket], *, keys: Sequence[ApiKey],
    layer_timeout_s: float, policy: str, metrics: MetricsSource | None = None,
    observers: Sequence[AnswerObserver] = (),
    on_ready: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Serve HTTP until a signal ends it.

    Args:
        sockets: bound to the config's host and port (`access.listening_sockets`); closed at the end.
        keys: of which callers must send one; without any every caller is let in.
        policy: that the base station chooses experts by, as `--policy` names it.
        metrics: observe the requests, and are served at `/metrics`; None for none.
        observers: further observers of the requests.
        on_ready: called once, when requests are accepted.

    Raises:
        ServeError: the request log can't be opened.
    """
    live = LiveFeed()
    policies = RequestPolicies(
        NamedPolicy(policy, station.model.policy), top_k=station.manifest.dims.top_k, scored=station.model.trunk.scored
    )  # fmt: skip
    facts = model_facts(station, policies.offered)
    view = LiveView(station.dispatcher, live, facts, most_running=config.max_live + config.max_waiting)
    server = AnswerServer(
        Scheduler(station.model, max_live=config.max_live),
        station.new_sequence,
        max_waiting=config.max_waiting,
        dispatcher=station.dispatcher,
        observers=[view, *([metrics] if metrics else []), *observers],
    )
    with request_log(config.request_log) if config.request_log else nullcontext() as log_request:
        app = http_app(
            server, station.tokenizer, model=station.manifest.source.name, keys=keys,
            stall_s=_STALLED_LAYERS * layer_timeout_s, max_positions=station.model.trunk.max_positions,
            hosts=allowed_hosts(config.host, keyed=bool(keys)), origin=config.cors_origin,
            model_aliases=config.model_alias, about=_about(station, policy),
            log_request=log_request, live=live, metrics=metrics, policies=policies,
        )  # fmt: skip
        settings = uvicorn.Config(
            app, host=config.host, port=config.port, log_config=None, log_level="warning", access_log=False,
            timeout_graceful_shutdown=_GRACE_S, http=LimitedProtocol,
        )  # fmt: skip
        server.start()
        try:
            _Uvicorn(settings, server, live, on_ready).run(list(sockets))
        except KeyboardInterrupt:  # uvicorn raises the signal again after its shutdown
            log.info("stopped")
        finally:
            server.stop()


def _about(station: "BaseStation", policy: str) -> dict[str, str]:
    """How the base station is configured, for the field `wdmoe` of responses."""
    chosen = {"preset": station.choice.preset} if station.choice else {}
    return {"policy": policy, "draft": station.speculation.mode, **chosen}


class _Uvicorn(uvicorn.Server):
    """Reports when it is ready, and ends running answers and streams before it closes their connections."""

    def __init__(
        self, config: uvicorn.Config, server: AnswerServer, live: LiveFeed, on_ready: Callable[[], None]
    ) -> None:  # fmt: skip
        super().__init__(config)
        self._server = server
        self._live = live
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            notify("READY=1")
            log.info("answers at http://%s:%d/v1", self.config.host, self.config.port)
            log.info("live page at http://%s:%d/", self.config.host, self.config.port)
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # First, so that the callers of running answers read why they end.
        await asyncio.to_thread(self._server.stop)
        self._live.close()
        await super().shutdown(sockets)
