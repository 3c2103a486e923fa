"""Time per token with some experts on the base station, compared with none: emulated links, the demo model, int4."""

import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bs_coordinator.base_station import BaseStation, open_base_station
from bs_coordinator.broker.processes import mosquitto_path, open_broker
from bs_coordinator.config import BaseStationConfig, ResidentConfig, SamplingConfig
from bs_coordinator.engine.sequence import TokenEvent
from bs_coordinator.nodes.registry import LOCAL_NODE
from bs_coordinator.resident.choice import Float, choose_resident
from common.errors import WdmoeError
from edge_node.experts import needed_bytes
from testbed.bench.rows import Row, Settings, Skipped
from testbed.demo_assets import demo_bundle
from testbed.errors import PrivilegeError
from testbed.local_nodes import local_nodes
from testbed.network.uniform import Links, write_network
from testbed.prompts import PROMPTS
from wire.experts import ExpertId
from wire.manifest import load_manifest

NODES = 8
RTT_MS = 5
MBPS = 100
SHARES = (0.25, 0.5)
LEARNT_FROM = 8
"""Number of prompts for learning the traffic; other prompts are measured."""
_TOKENS = 24
_WARM_UP = 2


def measure(settings: Settings) -> Iterator[Row | Skipped]:
    """Yield a row per choice of local experts. All experts are loaded; those in use change between answers."""
    name = f"decode, experts on the base station, {RTT_MS} ms"
    # Imported here because it needs Linux and pyroute2.
    from testbed.network.namespaces import check_privileges

    try:
        check_privileges()
    except PrivilegeError as error:
        yield Skipped(name, str(error))
        return
    if not mosquitto_path():
        yield Skipped(name, "mosquitto is not installed")
        return
    bundle = demo_bundle("int4", console=settings.console)
    with _station(settings, bundle) as station:
        arms = _arms(station)
        samples_ms: dict[str, list[float]] = {arm: [] for arm in arms}
        same = True
        prompts = PROMPTS[LEARNT_FROM : LEARNT_FROM + max(4, min(len(PROMPTS) - LEARNT_FROM, settings.samples // 20))]
        for i, prompt in enumerate(prompts):
            order = list(arms) if i % 2 else list(reversed(arms))
            ids = {}
            for arm in order:
                station.dispatcher.registry.hold_locally(arms[arm])
                events = _answer(station, prompt)
                ids[arm] = [event.id for event in events]
                samples_ms[arm].append(_token_ms(events))
            same &= len({tuple(some) for some in ids.values()}) == 1
        none_ms = samples_ms.pop("none")
        for arm, ours_ms in samples_ms.items():
            parameters = {
                "rtt_ms": RTT_MS,
                "mbps": MBPS,
                "nodes": NODES,
                "tokens": _TOKENS,
                "experts": len(arms[arm]),
                "samples": "mean ms per token of one answer after its first",
                "same_tokens": same,
            }
            yield Row(f"decode, {arm}, {RTT_MS} ms", "all experts on nodes", ours_ms, none_ms, None, parameters)


def _arms(station: BaseStation) -> dict[str, frozenset[ExpertId]]:
    """Local experts by arm: chosen as the base station does, and by the traffic of each expert alone."""
    every = station.dispatcher.registry.local_experts
    pairs, away_s, here_s = learn(station, PROMPTS[:LEARNT_FROM])
    by_traffic = sorted(every, key=lambda id: (-pairs[id.layer, id.expert, id.expert], id))
    arms: dict[str, frozenset[ExpertId]] = {"none": frozenset()}
    for share in SHARES:
        slots = round(share * len(every))
        arms[f"{share:.0%} of experts here"] = choose_resident(pairs, away_s, here_s, slots)
        arms[f"{share:.0%} here, each by its own traffic"] = frozenset(by_traffic[:slots])
    return arms


class Learnt(NamedTuple):
    """What a choice of local experts is made from: the arguments of `choose_resident`."""

    pairs: Float
    away_s: Float
    here_s: float


def learn(station: BaseStation, prompts: Sequence[str]) -> Learnt:
    """Answer prompts, the first one also with all experts here, on a station that has memory for all.

    No expert is here afterwards.
    """
    registry, residents = station.dispatcher.registry, station.residents
    assert residents is not None  # noqa: S101 - of the caller
    here_s = []
    for event in _answer(station, prompts[0]):
        for step in event.steps:
            here_s += [
                d.durations.compute_ns / 1e9 / len(d.experts)
                for layer in step.layers
                for d in layer.dispatches
                if d.node == LOCAL_NODE and d.tokens == 1
            ]
    registry.hold_locally(frozenset())
    for prompt in prompts:
        _answer(station, prompt)
    away_s = np.array([station.dispatcher.forecast(layer).one_row_s for layer in range(registry.dims.layers)])
    return Learnt(residents.traffic.pairs, away_s, statistics.median(here_s))


def _answer(station: BaseStation, prompt: str) -> list[TokenEvent]:
    ids = station.tokenizer.encode_chat([{"role": "user", "content": prompt}])
    return list(station.new_sequence().generate(ids, SamplingConfig(max_tokens=_TOKENS)))


def _token_ms(events: Sequence[TokenEvent]) -> float:
    steps = [step for event in events[_WARM_UP:] for step in event.steps]
    if not steps:
        raise WdmoeError(f"an answer has no more than {_WARM_UP} tokens, too few to measure")
    return sum(step.total_ns for step in steps) / len(steps) / 1e6


@contextmanager
def _station(settings: Settings, bundle: Path) -> Iterator[BaseStation]:
    """A system whose base station has memory for all experts; this thread is in its network namespace meanwhile."""
    from testbed.network import namespaces
    from testbed.network.daemon import BASE_STATION
    from testbed.network.emulated import emulated

    manifest = load_manifest(bundle)
    nodes = {f"node{k}": f"L*:E{k}" for k in range(NODES)}
    spec = settings.folder / "network-resident.yaml"
    write_network(spec, f"bench{os.getpid()}", list(nodes), [Links(RTT_MS, MBPS)])
    resident = ResidentConfig(needed_bytes(manifest.experts, manifest.quantisation.scheme))
    config = BaseStationConfig(bundle=bundle, degrade=False, draft="none", resident=resident)
    with (
        emulated(spec) as network,
        namespaces.inside(namespaces.namespace(network.spec.name, BASE_STATION)),
        open_broker("mosquitto", host=network.bs_address) as address,
        local_nodes(bundle, address, settings.folder / "nodes", nodes, prefixes={n: network.prefix(n) for n in nodes}),
        open_base_station(config, address) as station,
    ):
        yield station
