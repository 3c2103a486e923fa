"""Two fleets on one emulated network: each node's device holds whole experts in one process and slices in another.

Both are asked over the same links, so that whole and sliced experts can be compared in turns.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from bs_coordinator.base_station import BaseStation, open_base_station
from bs_coordinator.broker.processes import open_broker
from bs_coordinator.config import BaseStationConfig, ResidentConfig
from bs_coordinator.resident.room import needed_room
from common.files import atomic_write
from testbed.bench.rows import Settings
from testbed.local_nodes import LocalNodes, local_nodes
from testbed.network.emulated import EmulatedNetwork, emulated
from wire.manifest import load_manifest

_SLICED = "sliced"
"""Cluster of the second fleet."""


class Holding(NamedTuple):
    """A bundle, and which of its experts or slices each node holds."""

    bundle: Path
    experts: Mapping[str, str]


class TwoFleets(NamedTuple):
    """Both base stations, in this process; each must be pumped now and then, or its connection ends.

    Attributes:
        network: of all nodes.
        whole: asks for whole experts, has a draft model, and memory for all experts.
        sliced: asks for slices.
    """

    network: EmulatedNetwork
    whole: BaseStation
    sliced: BaseStation


@contextmanager
def two_fleets(
    settings: Settings, whole: Holding, sliced: Holding, *, spec: str, draft_model: Path
) -> Iterator[TwoFleets]:  # fmt: skip
    """Run both for the duration of the context; this thread is in the base stations' network namespace meanwhile.

    Args:
        settings: of the benchmark.
        whole, sliced: with the same nodes.
        spec: description of the network (`testbed.network.spec`).
        draft_model: folder.
    """
    from testbed.network import namespaces
    from testbed.network.daemon import BASE_STATION

    path = settings.folder / "network-levers.yaml"
    with atomic_write(path) as file:
        file.write(spec.encode())
    config = BaseStationConfig(
        bundle=whole.bundle, degrade=False, draft="auto", draft_model=draft_model,
        resident=ResidentConfig(needed_room(load_manifest(whole.bundle)).all_bytes),
    )  # fmt: skip
    other = BaseStationConfig(bundle=sliced.bundle, degrade=False, draft="none", cluster=_SLICED)
    logs = settings.folder / "nodes"
    with (
        emulated(path) as network,
        namespaces.inside(namespaces.namespace(network.spec.name, BASE_STATION)),
        open_broker("mosquitto", host=network.bs_address) as address,
        local_nodes(
            whole.bundle, address, logs, whole.experts, prefixes={node: network.prefix(node) for node in whole.experts}
        ),
    ):
        second = LocalNodes(sliced.bundle, address, logs / _SLICED, cluster=_SLICED)
        try:
            for node, experts in sliced.experts.items():
                second.start(node, experts, prefix=network.prefix(node))
            with open_base_station(config, address) as station, open_base_station(other, address) as slices:
                yield TwoFleets(network, station, slices)
        finally:
            second.stop()
