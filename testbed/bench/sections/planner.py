"""Predictions of `wdmoe-bs place` compared with runs: the demo model in int4, whole and in slices, on emulated links.

What a prediction is made from is measured before, in each fleet: the trunk alone, parts of layers while the fleet
rests, round trips of idle links; and once, how often experts are asked, in an answer that is not compared.

Every finished measurement is a line of a `sample_log` with all samples; an interrupted benchmark continues with what is
missing there.
"""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct

from bs_coordinator.engine.step_records import StepRecord
from bs_coordinator.placement.boards import BoardLink
from bs_coordinator.placement.known_fleet import predict_known
from bs_coordinator.placement.predict import Routing, Step
from bs_coordinator.placement.row_curve import RowCurve
from common.cores import usable_cores
from common.files import atomic_write
from exporter.bundle.bundle import export_bundle
from testbed.bench.alone import Parts
from testbed.bench.fleet_parts import FleetParts, measure_parts
from testbed.bench.plan_score import score
from testbed.bench.rows import Result, Row, Settings, Skipped
from testbed.bench.sample_log import sample_log
from testbed.bench.sections.decode import NODES, decode
from testbed.bench.system import System, running, why_not
from testbed.demo_assets import demo_bundle, demo_model, demo_quantisation
from testbed.network.uniform import Links
from testbed.prompts import PROMPTS
from wire.manifest import load_manifest
from wire.tensors import Array

SLICES = 4
RTTS_MS = (2.0, 10.0)
_TOKENS = 16
_COUNTED_TOKENS = 32
_IDLE_S = 1.0
_MOST_JOBS = 16


class Nodes(Struct, frozen=True):
    """Nodes that are started together, and the links on which they are measured, of which the first are dedicated.

    Attributes:
        name: for people.
        experts: selector of what each node holds.
        slices: of each expert.
        rates: Mbit/s of each link or of the channel, and whether all share one; each with both round trips.
    """

    name: str
    experts: Mapping[str, str]
    slices: int
    rates: Sequence[tuple[float, bool]]

    @property
    def links(self) -> list[Links]:
        """All links, in the order of measuring."""
        return [Links(rtt_ms, mbps, shared) for mbps, shared in self.rates for rtt_ms in RTTS_MS]


_QUARTERS = {f"node{k}": f"L*:E{k // 4 * 4}-{k // 4 * 4 + 3}/{k % 4}" for k in range(8)}
_FOUR = {f"node{k}": f"L*:E{2 * k}-{2 * k + 1}" for k in range(4)}
_FOUR_TWICE = {f"node{k}": f"L*:E{2 * k}-{2 * k + 1},{(2 * k + 2) % 8}-{(2 * k + 3) % 8}" for k in range(4)}
_FOUR_SLICES = {f"node{k}": f"L*:E*/{k}" for k in range(4)}
FLEETS = (
    Nodes("8 nodes, whole experts", NODES, 1, ((100, False), (20, True), (10, False))),
    Nodes("8 nodes, 4 slices", _QUARTERS, SLICES, ((100, False), (20, True))),
    Nodes("4 nodes, whole experts", _FOUR, 1, ((100, False),)),
    Nodes("4 nodes, two copies", _FOUR_TWICE, 1, ((100, False),)),
    Nodes("4 nodes, 4 slices", _FOUR_SLICES, SLICES, ((100, False), (100, True))),
)


class Compared(Struct, frozen=True):
    """A finished measurement: a line of `planner.jsonl`.

    Attributes:
        name: of nodes and links.
        predicted_ms: per token.
        measured_ms: of each token.
        step: the prediction's parts.
        trunk_ms: trunk and head for one token, alone.
        parts: of layers, measured on the idle fleet.
        idle_ms: round trips of idle links.
        unix_s: when it was finished.
    """

    name: str
    predicted_ms: float
    measured_ms: tuple[float, ...]
    step: Step
    trunk_ms: float
    parts: FleetParts
    idle_ms: tuple[float, ...]
    unix_s: int


def measure(settings: Settings) -> Iterator[Result]:
    """Yield a row per fleet and links: measured tokens against the prediction made before."""
    if why := why_not():
        yield Skipped("predictions on an emulated network", why)
        return
    whole = demo_bundle("int4", console=settings.console)
    sliced = settings.folder / f"sliced-{SLICES}"
    jobs = min(_MOST_JOBS, usable_cores())
    export_bundle(demo_model(console=settings.console), sliced, demo_quantisation("int4"), jobs=jobs, slices=SLICES)
    counts = settings.folder / "planner-traffic.npy"
    with sample_log(settings.folder, f"planner-{settings.device}", Compared) as log:
        done = {one.name: one for one in log.samples}
        for nodes in FLEETS:
            missing = [links for links in nodes.links if _name(nodes, links) not in done]
            if missing:
                bundle = whole if nodes.slices == 1 else sliced
                for one in _compare(settings, nodes, bundle, missing, counts):
                    log.add(one)
                    done[one.name] = one
            for links in nodes.links:
                yield _row(done[_name(nodes, links)])
    settings.console.print(_summary([*done.values()]), highlight=False)


def _name(nodes: Nodes, links: Links) -> str:
    return f"{nodes.name}, {'shared ' if links.shared_air else ''}{links.mbps:g} Mbit/s, {links.rtt_ms:g} ms"


def _compare(
    settings: Settings, nodes: Nodes, bundle: Path, missing: Sequence[Links], counts: Path
) -> Iterator[Compared]:
    """Start nodes, and predict and decode on each of the missing links."""
    manifest = load_manifest(bundle)
    first = nodes.links[0]
    with running(settings, bundle, nodes=nodes.experts, links=nodes.links) as system:
        trunk = Parts(bundle, system.station.model.trunk, past_tokens=48)
        trunk.measure()
        alone = trunk.alone()
        system.set_links(first)
        traffic = _traffic(system, counts)
        system.station.dispatcher.measure_links(_IDLE_S)
        parts = measure_parts(system.station.dispatcher, manifest.dims, _idle(system, first))
        for links in missing:
            system.set_links(links)
            system.station.dispatcher.measure_links(_IDLE_S)
            idle = _idle(system, links)
            step = predict_known(
                manifest, nodes.experts, idle, unit_s=parts.unit_ms.scaled(1e-3), crowd=parts.crowd, node_s=0.0,
                station=parts.station(RowCurve((1,), (1e-3 * (alone.trunk_ms + alone.head_ms),))),
                routing=Routing(traffic, manifest.dims.top_k), shared_air=links.shared_air,
            )  # fmt: skip
            steps = decode(system, PROMPTS[0], tokens=_TOKENS)
            yield Compared(
                _name(nodes, links), 1e3 * step.seconds, tuple(one.total_ns / 1e6 for one in steps), step,
                alone.trunk_ms + alone.head_ms, parts, tuple(1e3 * link.rtt_s for link in idle.values()),
                int(time.time()),
            )  # fmt: skip


def _idle(system: System, links: Links) -> dict[str, BoardLink]:
    """Links with the configured rates and the round trips that were measured while they were idle."""
    estimates = system.station.dispatcher.links.estimates(time.perf_counter())
    return {one.node: BoardLink(one.link.rtt_s, links.mbps, links.mbps) for one in estimates}


def _traffic(system: System, path: Path) -> Array:
    """How often experts are asked, float32 [layers, experts], counted once for all fleets and kept in a file."""
    if path.exists():
        known: Array = np.load(path)
        return known
    dims = system.station.manifest.dims
    traffic = np.ones((dims.layers, dims.experts), np.float32)
    _count(traffic, decode(system, PROMPTS[2], tokens=_COUNTED_TOKENS))
    with atomic_write(path) as file:
        np.save(file, traffic)
    return traffic


def _count(traffic: Array, steps: Sequence[StepRecord]) -> None:
    for step in steps:
        for number, layer in enumerate(step.layers):
            for dispatch in layer.dispatches:
                traffic[number, list(dispatch.experts)] += 1


def _row(one: Compared) -> Row:
    return Row(
        one.name, "prediction", list(one.measured_ms), [one.predicted_ms], None,
        {
            "trunk_alone_ms": one.trunk_ms, "idle_round_trip_ms": list(one.idle_ms), "predicted": one.step._asdict(),
            "parts": msgspec.to_builtins(one.parts),
        },
    )  # fmt: skip


def _summary(found: Sequence[Compared]) -> str:
    result = score([(one.predicted_ms, statistics.median(one.measured_ms)) for one in found])
    return (
        f"{result.within_20} of {result.fleets} fleets within 20 %; right about the faster of two in {result.right} of "
        f"{result.pairs} pairs that differ by 5 % ({result.all_right} of all {result.all_pairs})"
    )
