"""Node processes with a core each and a base station with the others, on an emulated network."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from bs_coordinator.base_station import BaseStation, open_base_station
from bs_coordinator.broker.processes import open_broker
from bs_coordinator.config import BaseStationConfig, TrunkDtype
from bs_coordinator.placement.boards import BoardLink
from testbed.local_nodes import local_nodes
from testbed.network import namespaces
from testbed.network.daemon import BASE_STATION
from testbed.network.emulated import EmulatedNetwork, emulated
from testbed.network.uniform import write_network
from testbed.node_shares import Cores, selectors_of
from testbed.whole_shape.arms import PROFILES, Arm
from wire.manifest import Manifest

NODES_TIMEOUT_S = 300.0
LAYER_TIMEOUT_S = 60.0
_SETTLE_S = 1.0


@dataclass(frozen=True, slots=True)
class ShapeFleet:
    """A running fleet."""

    network: EmulatedNetwork
    station: BaseStation

    def set_links(self, arm: Arm) -> None:
        """Switch all links to those of an arm, and measure them."""
        self.network.set_profile(arm.profile)
        self.station.dispatcher.links.shared_air = arm.shared_air
        self.station.dispatcher.measure_links(_SETTLE_S)

    def idle_links(self, mbps: float) -> dict[str, BoardLink]:
        """Links of this rate, with the round trips that were measured last."""
        estimates = self.station.dispatcher.links.estimates(time.perf_counter())
        return {one.node: BoardLink(one.link.rtt_s, mbps, mbps) for one in estimates}


@contextmanager
def running(bundle: Path, manifest: Manifest, folder: Path, cores: Cores, device: str) -> Iterator[ShapeFleet]:
    """Run a fleet for the duration of the context; this thread is in the base station's network namespace meanwhile.

    Args:
        folder: for logs and the network's description.
        device: of the trunk, which is in bf16 on a GPU.
    """
    selectors = selectors_of(manifest.dims, len(cores.nodes))
    folder.mkdir(parents=True, exist_ok=True)
    write_network(folder / "network.yaml", f"shape{os.getpid()}", list(selectors), PROFILES)
    dtype: TrunkDtype = "fp32" if device == "cpu" else "bf16"
    config = BaseStationConfig(
        bundle=bundle, degrade=False, device=device, dtype=dtype, nodes_timeout_s=NODES_TIMEOUT_S,
        layer_timeout_s=LAYER_TIMEOUT_S,
    )  # fmt: skip
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    # Broker and relay inherit this process's cores.
    os.sched_setaffinity(0, cores.station)
    torch.set_num_threads(max(1, len(cores.station) - 1))
    try:
        with (
            emulated(folder / "network.yaml") as network,
            namespaces.inside(namespaces.namespace(network.spec.name, BASE_STATION)),
            open_broker("mosquitto", host=network.bs_address) as address,
            local_nodes(
                bundle, address, folder / "nodes", selectors,
                prefixes={
                    node: [*network.prefix(node), "taskset", "-c", str(core)]
                    for node, core in zip(selectors, cores.nodes, strict=False)
                },
            ),
            open_base_station(config, address) as station,
        ):  # fmt: skip
            yield ShapeFleet(network, station)
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(threads)
