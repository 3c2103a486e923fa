"""A whole system on an emulated network for benchmarks: mosquitto, nodes, base station."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from bs_coordinator.base_station import BaseStation, open_base_station
from bs_coordinator.broker.processes import mosquitto_path, open_broker
from bs_coordinator.config import BaseStationConfig, DraftMode
from common.real_time import Priority
from testbed.bench.rows import Settings
from testbed.errors import PrivilegeError
from testbed.local_nodes import local_nodes
from testbed.network.emulated import EmulatedNetwork, emulated
from testbed.network.uniform import Links, write_network


@dataclass(frozen=True, slots=True)
class System:
    """A running system.

    Attributes:
        network: its emulated network.
        station: base station, in this process.
        processes: process ids of the whole system, by role.
    """

    network: EmulatedNetwork
    station: BaseStation
    processes: Mapping[str, Sequence[int]]

    def set_links(self, links: Links) -> None:
        """Switch to other links, which the system was started with."""
        self.network.set_profile(links.profile)
        self.station.dispatcher.links.shared_air = links.shared_air

    def core_ms(self) -> dict[str, float]:
        """Milliseconds since their start that processes ran on a core, and waited for one, by role."""
        found = {}
        for role, pids in self.processes.items():
            times = [_schedstat_ms(pid) for pid in pids]
            found[f"{role} on a core"] = sum(running for running, _ in times)
            found[f"{role} waiting for one"] = sum(waiting for _, waiting in times)
        return found


def why_not() -> str:
    """Reason why this machine can't run it; empty if it can."""
    # Imported here because it needs Linux and pyroute2.
    from testbed.network.namespaces import check_privileges

    try:
        check_privileges()
    except PrivilegeError as error:
        return str(error)
    if shutil.which("setsid") is None or shutil.which("nsenter") is None:
        return "emulated networks need setsid and nsenter: install util-linux"
    return "" if mosquitto_path() else "mosquitto is not installed"


@contextmanager
def running(
    settings: Settings, bundle: Path, *, nodes: Mapping[str, str], links: Sequence[Links],
    draft: DraftMode = "none", draft_model: Path | None = None, priority: Priority = "auto",
) -> Iterator[System]:  # fmt: skip
    """Run a system for the duration of the context, on the first of the links.

    This thread is in the base station's network namespace meanwhile.

    Args:
        settings: settings of the benchmark.
        bundle: bundle of base station and nodes.
        nodes: experts by node.
        links: that the system can be switched to.
        draft, draft_model: as in `BaseStationConfig`.
        priority: of base station, nodes and broker.
    """
    from testbed.network import namespaces
    from testbed.network.daemon import BASE_STATION

    spec = settings.folder / "network.yaml"
    config = BaseStationConfig(
        bundle=bundle, degrade=False, draft=draft, draft_model=draft_model, shared_air=links[0].shared_air,
        priority=priority, device=settings.device,
    )  # fmt: skip
    write_network(spec, f"bench{os.getpid()}", list(nodes), links)
    with (
        emulated(spec) as network,
        namespaces.inside(namespaces.namespace(network.spec.name, BASE_STATION)),
        open_broker("mosquitto", host=network.bs_address, priority=priority) as address,
        local_nodes(
            bundle,
            address,
            settings.folder / "nodes",
            nodes,
            prefixes={node: network.prefix(node) for node in nodes},
            options=["--priority", priority],
        ) as local,
        open_base_station(config, address) as station,
    ):
        brokers = [p.pid for p in psutil.Process().children(recursive=True) if p.name() == "mosquitto"]
        processes = {
            "base station": [os.getpid()],
            "nodes": [process.pid for process in local.processes.values()],
            "broker": brokers,
            "relay": [network.status().pid],
        }
        yield System(network, station, processes)


def _schedstat_ms(pid: int) -> tuple[float, float]:
    """Milliseconds that all threads of a process ran and waited for a core; 0 if the kernel does not report it."""
    running_ns = waiting_ns = 0
    for file in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError):
            running, waiting, _ = map(int, file.read_text().split())
            running_ns, waiting_ns = running_ns + running, waiting_ns + waiting
    return running_ns / 1e6, waiting_ns / 1e6
