"""Predictions of `wdmoe-bs place` compared with runs: the demo model in int4, whole and in slices, on emulated links.

What a prediction is made from is measured before: trunk, head and one unit alone, round trips of idle links, and how
often experts are asked, in a part of the first fleet's answers that is not compared.
"""

import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bs_coordinator.engine.step_records import StepRecord
from bs_coordinator.placement.boards import BoardLink
from bs_coordinator.placement.known_fleet import predict_known
from bs_coordinator.placement.predict import Routing, Station
from common.files import atomic_write
from exporter.bundle.bundle import export_bundle
from testbed import facts
from testbed.bench.alone import Parts
from testbed.bench.plan_score import score
from testbed.bench.rows import Result, Row, Settings, Skipped
from testbed.bench.sections.decode import NODES, decode
from testbed.bench.system import System, running, why_not
from testbed.demo_assets import demo_bundle, demo_model, demo_quantisation
from testbed.prompts import PROMPTS
from wire.manifest import load_manifest

SLICES = 4
RTTS_MS = (2.0, 10.0)
_TOKENS = 20
_ANSWERS = 2
_IDLE_S = 1.0


@dataclass(frozen=True, slots=True)
class Fleet:
    """A fleet that is started; both round trips are measured in it.

    Attributes:
        name: for messages.
        nodes: selector of what each node holds.
        slices: of each expert.
        mbps: rate of each link, or of the channel.
        shared_air: whether all links share one channel.
    """

    name: str
    nodes: Mapping[str, str]
    slices: int
    mbps: float
    shared_air: bool


_QUARTERS = {f"node{k}": f"L*:E{k // 4 * 4}-{k // 4 * 4 + 3}/{k % 4}" for k in range(8)}
_FOUR = {f"node{k}": f"L*:E{2 * k}-{2 * k + 1}" for k in range(4)}
_FOUR_TWICE = {f"node{k}": f"L*:E{2 * k}-{2 * k + 1},{(2 * k + 2) % 8}-{(2 * k + 3) % 8}" for k in range(4)}
_FOUR_SLICES = {f"node{k}": f"L*:E*/{k}" for k in range(4)}
FLEETS = (
    Fleet("8 nodes, whole experts", NODES, 1, 100, False),
    Fleet("8 nodes, 4 slices", _QUARTERS, SLICES, 100, False),
    Fleet("8 nodes, whole experts, shared air", NODES, 1, 20, True),
    Fleet("8 nodes, 4 slices, shared air", _QUARTERS, SLICES, 20, True),
    Fleet("4 nodes, whole experts", _FOUR, 1, 100, False),
    Fleet("4 nodes, two copies", _FOUR_TWICE, 1, 100, False),
    Fleet("4 nodes, 4 slices, shared air", _FOUR_SLICES, SLICES, 100, True),
    Fleet("8 nodes, whole experts, slow links", NODES, 1, 10, False),
)


def measure(settings: Settings) -> Iterator[Result]:
    """Yield a row per fleet and round trip: measured tokens against the prediction made before."""
    if why := why_not():
        yield Skipped("predictions on an emulated network", why)
        return
    whole = demo_bundle("int4", console=settings.console)
    sliced = settings.folder / f"sliced-{SLICES}"
    export_bundle(demo_model(console=settings.console), sliced, demo_quantisation("int4"), jobs=2, slices=SLICES)
    traffic = np.ones((load_manifest(whole).dims.layers, len(NODES)), np.float32)
    found: list[dict[str, Any]] = []
    for number, fleet in enumerate(FLEETS):
        bundle = whole if fleet.slices == 1 else sliced
        with running(
            settings, bundle, nodes=fleet.nodes, rtts_ms=RTTS_MS, mbps=fleet.mbps, shared_air=fleet.shared_air
        ) as system:
            parts = Parts(bundle, system.station.model.trunk, past_tokens=48)
            for rtt in RTTS_MS:
                system.network.set_profile(f"rtt{rtt:g}")
                counting = decode(system, PROMPTS[_ANSWERS], tokens=_TOKENS)
                if number == 0:
                    _count(traffic, counting)
                parts.measure()
                system.station.dispatcher.measure_links(_IDLE_S)
                row = _compare(fleet, bundle, rtt, system, parts, traffic)
                found.append({"name": row.name, "predicted_ms": row.floor_ms[0], "measured_ms": list(row.ours_ms)})
                _write(settings, found)
                yield row
    settings.console.print(_summary(found), highlight=False)


def _compare(
    fleet: Fleet, bundle: Path, rtt_ms: float, system: System, parts: Parts, traffic: np.ndarray[Any, Any]
) -> Row:
    """Predict, then decode."""
    manifest, alone = load_manifest(bundle), parts.alone()
    idle_s = {one.node: one.link.rtt_s for one in system.station.dispatcher.links.estimates(time.perf_counter())}
    step = predict_known(
        manifest, fleet.nodes, {node: BoardLink(idle_s[node], fleet.mbps, fleet.mbps) for node in fleet.nodes},
        unit_s=1e-3 * alone.compute_ms(1), further_s=0.0, shared_air=fleet.shared_air,
        station=Station(1e-3 * (alone.trunk_ms + alone.head_ms), 0.0),
        routing=Routing(traffic, manifest.dims.top_k),
    )  # fmt: skip
    steps = [step for prompt in PROMPTS[:_ANSWERS] for step in decode(system, prompt, tokens=_TOKENS)]
    return Row(
        f"{fleet.name}, {fleet.mbps:g} Mbit/s, {rtt_ms:g} ms", "prediction",
        [one.total_ns / 1e6 for one in steps], [1e3 * step.seconds], None,
        {
            "nodes": dict(fleet.nodes), "slices": fleet.slices, "mbps": fleet.mbps, "rtt_ms": rtt_ms,
            "shared_air": fleet.shared_air, "trunk_alone_ms": alone.trunk_ms, "head_alone_ms": alone.head_ms,
            "unit_alone_ms": alone.compute_ms(1), "idle_round_trip_ms": [1e3 * s for s in idle_s.values()],
            "predicted": step._asdict(),
        },
    )  # fmt: skip


def _count(traffic: np.ndarray[Any, Any], steps: Sequence[StepRecord]) -> None:
    for step in steps:
        for number, layer in enumerate(step.layers):
            for dispatch in layer.dispatches:
                traffic[number, list(dispatch.experts)] += 1


def _times(found: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    return [(one["predicted_ms"], statistics.median(one["measured_ms"])) for one in found]


def _write(settings: Settings, found: Sequence[Mapping[str, Any]]) -> None:
    """Write all fleets so far with every sample, and how well they agree."""
    settings.folder.mkdir(parents=True, exist_ok=True)
    document = {**facts.result_header(1), "fleets": list(found), "score": score(_times(found))._asdict()}
    with atomic_write(settings.folder / "planner.json") as file:
        file.write(json.dumps(document).encode())


def _summary(found: Sequence[Mapping[str, Any]]) -> str:
    result = score(_times(found))
    return (
        f"{result.within_20} of {result.fleets} fleets within 20 %; right about the faster of two in {result.right} of "
        f"{result.pairs} pairs that differ by 5 % ({result.all_right} of all {result.all_pairs})"
    )
