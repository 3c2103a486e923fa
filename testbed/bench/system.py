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
from common.files import atomic_write
from testbed.bench.rows import Settings
from testbed.errors import PrivilegeError
from testbed.local_nodes import local_nodes
from testbed.network.emulated import EmulatedNetwork, emulated

DEDICATED_MBPS = 100


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
    settings: Settings, bundle: Path, *, nodes: Mapping[str, str], rtts_ms: Sequence[float],
    mbps: float = DEDICATED_MBPS, shared_air: bool = False, draft: DraftMode = "none", draft_model: Path | None = None,
) -> Iterator[System]:  # fmt: skip
    """Run a system on links of one rate, for the duration of the context.

    This thread is in the base station's network namespace meanwhile.

    Args:
        settings: settings of the benchmark.
        bundle: bundle of base station and nodes.
        nodes: experts by node.
        rtts_ms: round trips; each gets a profile `rtt<ms>`.
        mbps: rate of each link, or of the channel.
        shared_air: whether all links share one channel.
        draft, draft_model: as in `BaseStationConfig`.
    """
    from testbed.network import namespaces
    from testbed.network.daemon import BASE_STATION

    spec = settings.folder / "network.yaml"
    config = BaseStationConfig(
        bundle=bundle, degrade=False, draft=draft, draft_model=draft_model, shared_air=shared_air
    )
    with atomic_write(spec) as file:
        file.write(_spec(list(nodes), rtts_ms, mbps, shared_air=shared_air).encode())
    with (
        emulated(spec) as network,
        namespaces.inside(namespaces.namespace(network.spec.name, BASE_STATION)),
        open_broker("mosquitto", host=network.bs_address) as address,
        local_nodes(
            bundle, address, settings.folder / "nodes", nodes, prefixes={node: network.prefix(node) for node in nodes}
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


def _spec(nodes: Sequence[str], rtts_ms: Sequence[float], mbps: float, *, shared_air: bool) -> str:
    rates, shared = f"down_mbps: {mbps:g}, up_mbps: {mbps:g}", f"shared_air: {'true' if shared_air else 'false'}"
    profiles = "".join(f"  rtt{rtt:g}: {{{shared}, default: {{{rates}, delay_ms: {rtt / 2:g}}}}}\n" for rtt in rtts_ms)
    return f"name: bench{os.getpid()}\nnodes: [{', '.join(nodes)}]\nprofiles:\n{profiles}"


def _schedstat_ms(pid: int) -> tuple[float, float]:
    """Milliseconds that all threads of a process ran and waited for a core; 0 if the kernel does not report it."""
    running_ns = waiting_ns = 0
    for file in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError):
            running, waiting, _ = map(int, file.read_text().split())
            running_ns, waiting_ns = running_ns + running, waiting_ns + waiting
    return running_ns / 1e6, waiting_ns / 1e6
