"""Where a layer of a decode step spends its time, hop by hop, from the kernel's time stamps of packets."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.table import Table

from bs_coordinator.engine.step_records import StepRecord
from common.errors import WdmoeError
from testbed.bench.alone import Parts
from testbed.bench.floor import FloorLink
from testbed.bench.hops import BROKER, LOOPBACK, NODE, Hops, Passages
from testbed.bench.packets import packet_log
from testbed.bench.rows import Result, Row, Settings, Skipped
from testbed.bench.sections.decode import NODES, WARM_UP, decode
from testbed.bench.system import running, why_not
from testbed.demo_assets import demo_bundle
from testbed.network.emulated import EmulatedNetwork
from testbed.network.uniform import DEDICATED_MBPS, Links
from testbed.prompts import PROMPTS

RTT_MS = 5.0
_MOST_STEPS = 64
_STEPS = 16
"""Steps of each answer that count, after the first `WARM_UP`."""
_CLOCK_STEP_NS = 100_000


def measure(settings: Settings) -> Iterator[Result]:
    """Yield a row whose samples are layers and whose parts are hops, and print all hops."""
    if why := why_not():
        yield Skipped("hops on an emulated network", why)
        return
    yield from trace(settings, demo_bundle("int4", console=settings.console), steps=min(_MOST_STEPS, settings.samples))


def trace(settings: Settings, bundle: Path, *, steps: int) -> Iterator[Result]:
    """Trace so many decode steps of a model, eight of whose experts are on nodes of their own."""
    kept: list[StepRecord] = []
    with running(settings, bundle, nodes=NODES, links=[Links(RTT_MS)]) as system:
        parts = Parts(bundle, system.station.model.trunk, past_tokens=48)
        parts.measure()
        clock_ns = _wall_minus_monotonic_ns()
        with packet_log(_interfaces(system.network)) as log:
            for i in range(-(-steps // _STEPS)):
                system.station.dispatcher.measure_links(0.5)
                # The prompt gives the first token. Packets are taken in between steps.
                tokens = 1 + WARM_UP + min(_STEPS, steps - len(kept))
                kept += decode(system, PROMPTS[i % len(PROMPTS)], tokens=tokens, after_step=log.drain)
                parts.measure()
        if abs(_wall_minus_monotonic_ns() - clock_ns) > _CLOCK_STEP_NS:
            raise WdmoeError("the wall clock was set during the measurement: repeat it")
        layers = system.station.model.trunk.layers
    alone, link, passages = parts.alone(), FloorLink(RTT_MS, DEDICATED_MBPS), Passages(log.sightings)
    found = [passages.hops(layer, link, alone, layers=layers) for step in kept for layer in step.layers]
    hops = [one for one in found if one is not None]
    if not hops:
        raise WdmoeError(f"of {len(found)} layers no packets were seen")
    settings.console.print(_table(hops))
    names = list(hops[0].ms)
    yield Row(
        f"a layer of a decode step, {RTT_MS:g} ms round trip, {len(NODES)} nodes",
        "link, expert and trunk alone",
        [sum(one.ms.values()) for one in hops],
        [sum(one.alone_ms.values()) for one in hops],
        None,
        {
            "rtt_ms": RTT_MS, "mbps": DEDICATED_MBPS, "bundle": bundle.name, "nodes": len(NODES), "steps": len(kept),
            "layers_without_packets": len(found) - len(hops),
            "hops_ms": {name: [round(one.ms[name], 4) for one in hops] for name in names},
            "alone_ms": {name: [round(one.alone_ms[name], 4) for one in hops] for name in hops[0].alone_ms},
            "parts": "means over layers of the time beyond the floor",
        },
        {name: float(np.mean([one.ms[name] - one.alone_ms.get(name, 0.0) for one in hops])) for name in names},
    )  # fmt: skip


def _interfaces(network: EmulatedNetwork) -> list[tuple[str, str, str]]:
    # Imported here because they need Linux and pyroute2.
    from testbed.network.daemon import BASE_STATION
    from testbed.network.namespaces import INTERFACE, namespace

    station = namespace(network.spec.name, BASE_STATION)
    nodes = [(NODE, namespace(network.spec.name, node), INTERFACE) for node in network.nodes]
    return [(LOOPBACK, station, "lo"), (BROKER, station, INTERFACE), *nodes]


def _wall_minus_monotonic_ns() -> int:
    # The largest: between two readings this thread may lose its core.
    return max(time.time_ns() - time.monotonic_ns() for _ in range(10))


def _table(hops: list[Hops]) -> Table:
    """Hops in order: medians, 90 % quantiles and means, of which only means add up."""
    table = Table("per layer, ms", pad_edge=False, padding=(0, 1))
    for column in ("median", "p90", "mean", "alone"):
        table.add_column(column, justify="right")
    alone = hops[0].alone_ms.keys()
    for name in hops[0].ms:
        alone_ms = f"{np.mean([one.alone_ms[name] for one in hops]):.3f}" if name in alone else ""
        table.add_row(name, *_quantiles_and_mean([one.ms[name] for one in hops]), alone_ms)
    floor_ms = np.mean([sum(one.alone_ms.values()) for one in hops])
    table.add_section()
    table.add_row("the layer", *_quantiles_and_mean([sum(one.ms.values()) for one in hops]), f"{floor_ms:.3f}")
    return table


def _quantiles_and_mean(samples: list[float]) -> list[str]:
    median, p90 = np.quantile(samples, [0.5, 0.9])
    return [f"{median:.3f}", f"{p90:.3f}", f"{np.mean(samples):.3f}"]
