"""A whole system on this machine: broker, node processes and HTTP server, until a signal ends them.

What can be wrong is checked before torch is imported, which takes seconds.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from bs_coordinator.broker.processes import open_broker
from bs_coordinator.commands.station import with_field_log
from bs_coordinator.config import PRIVATE_BROKERS, BaseStationConfig, ServeConfig
from bs_coordinator.http.access import listening_sockets, read_keys
from bs_coordinator.selection.registry import configured_policy
from testbed.demo.next_steps import describe_broker, describe_server, server_url
from testbed.demo_assets import demo_bundle
from testbed.local_nodes import LocalNodes, local_nodes
from wire.manifest import load_manifest
from wire.transports import connect

if TYPE_CHECKING:
    from bs_coordinator.base_station import BaseStation

log = logging.getLogger("wdmoe-testbed")


def run_fleet(config: BaseStationConfig, http: ServeConfig, *, demo: str | None, nodes: int, runs: Path) -> None:
    """Serve a model from node processes on this machine until SIGINT or SIGTERM.

    Args:
        config: its broker is one of this machine's own, or is already running.
        demo: the demo model whose bundle `config` names, to be made if it is missing; None for any other bundle.
        nodes: number of node processes; node k holds experts k, k + nodes, … of every layer.
        runs: folder for the nodes' logs.

    Raises:
        ServeError: the port is taken, or the address is not this machine's.
        WdmoeError: a node ended at once, or another part can't be started.
    """
    keys = read_keys(http)
    with ExitStack() as stack:
        sockets = stack.enter_context(listening_sockets(http.host, http.port))
        logs = runs / time.strftime("up-%Y%m%d-%H%M%S")
        station, started = stack.enter_context(local_fleet(config, demo=demo, nodes=nodes, logs=logs))

        from bs_coordinator.http.server import serve_station
        from bs_coordinator.metrics import StationMetrics
        from bs_coordinator.tracing import answer_traces

        model = station.manifest.source.name

        def on_ready() -> None:
            click.echo()
            click.echo(
                describe_server(
                    server_url(http.host, http.port), model=model,
                    chat=station.tokenizer.has_chat_template, api_key_file=http.api_key_file,
                )
            )  # fmt: skip
            if http.api_keys_file is not None and http.api_key_file is None:
                click.echo(f"Callers need a key of {http.api_keys_file}: Authorization: Bearer KEY")
            click.echo(describe_broker(str(started.address), bundle=config.bundle))
            pids = ", ".join(f"{node} {process.pid}" for node, process in started.processes.items())
            click.echo(f"Processes of the nodes: {pids}")
            click.echo("Answers go on without a node: try 'kill' on one. Ctrl-C ends everything.")

        traces = stack.enter_context(answer_traces(asked_for=http.trace, model=model))
        serve_station(
            station, http, sockets, keys=keys, layer_timeout_s=config.layer_timeout_s, policy=station.config.policy,
            metrics=StationMetrics(station.dispatcher, model=model, preset=station.levers), observers=traces,
            on_ready=on_ready,
        )  # fmt: skip


@contextmanager
def local_fleet(
    config: BaseStationConfig, *, demo: str | None, nodes: int, logs: Path
) -> Iterator[tuple["BaseStation", LocalNodes]]:
    """A base station and the node processes of this machine that it asks, all of them ready.

    Args:
        config: its broker is one of this machine's own, or is already running.
        demo: the demo model whose bundle `config` names, to be made if it is missing; None for any other bundle.
        nodes: number of node processes; node k holds experts k, k + nodes, … of every layer.
        logs: folder for the nodes' logs.

    Raises:
        WdmoeError: a node ended at once, or another part can't be started.
    """
    with ExitStack() as stack:
        address = stack.enter_context(open_broker(config.broker, priority=config.priority))
        if config.broker not in PRIVATE_BROKERS:
            connect(address, f"wdmoe-up-{time.time_ns():x}").close()
        if demo is not None:
            demo_bundle("int4", model=demo, console=Console(stderr=True))
        manifest = load_manifest(config.bundle)
        configured_policy(config, manifest)
        config = with_field_log(config)
        experts = spread_experts(manifest.dims.experts, nodes)
        log.info("loading %s; %d nodes write their logs to %s", manifest.source.name, len(experts), logs)
        priority = ["--priority", config.priority]
        started = stack.enter_context(local_nodes(config.bundle, address, logs, experts, options=priority))

        from bs_coordinator.base_station import open_base_station

        station = stack.enter_context(
            open_base_station(config, address, on_progress=lambda line: log.info("waiting: %s", line))
        )
        yield station, started


def spread_experts(experts: int, nodes: int) -> dict[str, str]:
    """Selector of each node's experts: of every layer, node k holds experts k, k + nodes, …"""
    return {f"node{k}": f"L*:E{','.join(map(str, range(k, experts, nodes)))}" for k in range(min(nodes, experts))}
