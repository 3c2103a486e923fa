"""Opening a base station, or only the connection to its nodes, for a command or a program."""

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from bs_coordinator.config import BaseStationConfig, ClusterConfig

if TYPE_CHECKING:
    from bs_coordinator.base_station import BaseStation
    from bs_coordinator.dispatch.dispatcher import Dispatcher
    from bs_coordinator.links import LinkSample
    from wire.broker_address import BrokerAddress
    from wire.manifest import Manifest

log = logging.getLogger("wdmoe-bs")

_STATUSES_S = 1.0
"""Time for the retained statuses of nodes to arrive."""
_TIMEOUT_S = 5.0


@contextmanager
def open_station(config: BaseStationConfig) -> Iterator["BaseStation"]:
    """A base station that is ready; what it waits for, and what it had to drop, goes to the log.

    What can be checked at once is checked before torch is imported, which takes seconds. The counts of how often
    experts are asked for are kept in the user's state folder, one file per model.
    """
    from common.user_folders import user_path

    manifest = _check_files(config)
    config = with_field_log(config)
    traffic = user_path("state") / "traffic" / f"{manifest.model_sha256[:16]}.json"
    config = replace(config, resident=replace(config.resident, traffic=traffic))
    with ExitStack() as stack:
        address = stack.enter_context(_reachable_broker(config))
        log.info("loading %s", manifest.source.name)
        from bs_coordinator.base_station import open_base_station

        station = stack.enter_context(
            open_base_station(config, address, on_progress=lambda line: log.info("waiting: %s", line))
        )
        stack.enter_context(_cores_left(station))
        slowest_ms = max(station.nodes_ms.values(), default=0.0)
        log.info(
            "%d nodes ready; broker round trip %.2f ms, slowest node %.1f ms",
            len(station.nodes_ms), station.broker_ms, slowest_ms,
        )  # fmt: skip
        yield station
        if station.dispatcher.dropped:
            counts = ", ".join(f"{why} {n}" for why, n in sorted(station.dispatcher.dropped.items()))
            log.warning("dropped messages that answer no request: %s", counts)


def with_field_log(config: BaseStationConfig) -> BaseStationConfig:
    """With the preset `field`, every link sample is kept: in the user's state folder, unless a file is named."""
    if config.preset != "field" or config.link_log is not None:
        return config
    from common.user_folders import user_folder

    with user_folder("state") as folder:
        (folder / "links").mkdir(exist_ok=True)
    path = folder / "links" / f"{config.cluster}.jsonl"
    log.info("preset field: link-log %s: every link sample, for 'wdmoe-bs replay'", path)
    return replace(config, link_log=path)


@contextmanager
def _cores_left(station: "BaseStation") -> Iterator[None]:
    """Meanwhile torch has only as many threads as the nodes on this machine leave cores, unless the user set a number.

    Torch's idle threads spin: on cores that nodes need, they make every token about twice as slow.
    """
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    import torch

    host = socket.gethostname()
    machines = [status.machine for status in station.dispatcher.registry.nodes.values()]
    taken = sum(machine.threads for machine in machines if machine is not None and machine.host == host)
    before = torch.get_num_threads()
    if taken:
        torch.set_num_threads(max(1, before - taken))
        log.info("nodes on this machine use %d threads, the trunk %d", taken, torch.get_num_threads())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_files(config: BaseStationConfig) -> "Manifest":
    """The bundle's manifest, once bundle, policy and cluster key are known to be usable."""
    from bs_coordinator.selection.registry import configured_policy
    from wire.frame_auth import read_cluster_key
    from wire.signature import load_trusted_manifest

    manifest = load_trusted_manifest(config.bundle, config.bundle_key)
    configured_policy(config, manifest)
    if config.cluster_key is not None:
        read_cluster_key(config.cluster_key, config.cluster)
    return manifest


@contextmanager
def _reachable_broker(config: BaseStationConfig) -> Iterator["BrokerAddress"]:
    """The config's broker, to which one connection was made."""
    from bs_coordinator.broker.processes import configured_broker
    from wire.transports import connect

    with configured_broker(config) as address:
        if not address.in_process:
            connect(address, f"wdmoe-bs-{secrets.token_hex(4)}").close()
        yield address


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
