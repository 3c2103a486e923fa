"""Opening a base station, or only the connection to its nodes, for a command."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from bs_coordinator.config import BaseStationConfig, ClusterConfig

if TYPE_CHECKING:
    from bs_coordinator.base_station import BaseStation
    from bs_coordinator.dispatch.dispatcher import Dispatcher
    from bs_coordinator.links import LinkSample

log = logging.getLogger("wdmoe-bs")

_STATUSES_S = 1.0
"""Time for the retained statuses of nodes to arrive."""
_TIMEOUT_S = 5.0


@contextmanager
def open_station(config: BaseStationConfig) -> Iterator["BaseStation"]:
    """A base station that is ready; what it waits for, and what it had to drop, goes to the log.

    The counts of how often experts are asked for are kept in the user's state folder, one file per model.
    """
    from bs_coordinator.base_station import open_base_station
    from common.user_folders import user_path
    from wire.signature import load_trusted_manifest

    if config.resident is not None:
        model = load_trusted_manifest(config.bundle, config.bundle_key).model_sha256
        traffic = user_path("state") / "traffic" / f"{model[:16]}.json"
        config = replace(config, resident=replace(config.resident, traffic=traffic))
    with open_base_station(config, on_progress=lambda line: log.info("waiting: %s", line)) as station:
        slowest_ms = max(station.nodes_ms.values(), default=0.0)
        log.info(
            "%d nodes ready; broker round trip %.2f ms, slowest node %.1f ms",
            len(station.nodes_ms), station.broker_ms, slowest_ms,
        )  # fmt: skip
        yield station
        if station.dispatcher.dropped:
            counts = ", ".join(f"{why} {n}" for why, n in sorted(station.dispatcher.dropped.items()))
            log.warning("dropped messages that answer no request: %s", counts)


@contextmanager
def connect_nodes(
    config: ClusterConfig, link_log: "Callable[[LinkSample], None] | None" = None
) -> Iterator["Dispatcher"]:
    """A connection to the nodes that are online, without a model.

    Args:
        link_log: called with every link sample.
    """
    from bs_coordinator.broker.processes import configured_broker
    from bs_coordinator.dispatch.dispatcher import Dispatcher
    from bs_coordinator.links import LinkMonitor
    from bs_coordinator.links.log import no_log
    from bs_coordinator.nodes.registry import NodeRegistry
    from wire.frame_auth import read_cluster_key
    from wire.signature import load_trusted_manifest
    from wire.tensors import WireDtype
    from wire.topics import Topics
    from wire.transports import connect

    manifest = load_trusted_manifest(config.bundle, config.bundle_key)
    key = read_cluster_key(config.cluster_key, config.cluster) if config.cluster_key else None
    with (
        configured_broker(config) as address,
        closing(connect(address, f"wdmoe-bs-look-{time.time_ns():x}")) as transport,
    ):
        dispatcher = Dispatcher(
            transport, Topics(config.cluster),
            NodeRegistry(manifest.dims, manifest.model_sha256, tagged=key is not None),
            dtype=WireDtype.FP16, timeout_s=_TIMEOUT_S, links=LinkMonitor(log=link_log or no_log), cluster_key=key,
        )  # fmt: skip
        dispatcher.pump(_STATUSES_S)
        yield dispatcher
