"""Time per token as nodes, layers and messages grow: measurements with fitted lines, plotted, with their data."""

import itertools
import socket
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from bs_coordinator.broker.processes import LOOPBACK, open_broker
from bs_coordinator.engine.step_records import StepRecord
from common.files import atomic_write
from testbed.bench.alone import Parts
from testbed.bench.floor import FloorLink, floor_ms
from testbed.bench.rows import Result, Row, Settings, Skipped, plot
from testbed.bench.sections.decode import decode
from testbed.bench.sections.prefill import prefill
from testbed.bench.sections.transport import compare, echoes, link
from testbed.bench.system import running, why_not
from testbed.demo_assets import demo_bundle
from testbed.network.uniform import DEDICATED_MBPS, Links
from testbed.prompts import PROMPTS
from wire.transport import Transport

_RTT_MS = 5.0
_NODES = (1, 2, 4, 8)
_EXPERTS = 8
_TOKENS = 16
_PREFILL_TOKENS = 256
_KIB = (1, 4, 16, 64, 256, 1024)


class Fit(NamedTuple):
    """`ms = intercept + slope · x`, by least squares.

    Attributes:
        intercept, slope: in ms, and ms per unit of x.
        r2: share of the variance that the line explains.
    """

    intercept: float
    slope: float
    r2: float


def fit_line(x: Sequence[float], y: Sequence[float], *, relative: bool = False) -> Fit:
    """Fit a line to points by least squares.

    Args:
        x, y: coordinates of the points.
        relative: minimise relative errors, for points that span orders of magnitude.
    """
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    slope, intercept = np.polyfit(xs, ys, 1, w=1 / ys if relative else None)
    scale = ys if relative else np.ones_like(ys)
    rest = (ys - intercept - slope * xs) / scale
    spread = (ys - np.average(ys, weights=1 / scale**2)) / scale
    return Fit(float(intercept), float(slope), 1 - float((rest**2).sum() / max((spread**2).sum(), 1e-30)))


def measure(settings: Settings) -> Iterator[Result]:
    """Yield rows for 1 to 8 nodes, and for messages of 1 KiB to 1 MiB on loopback and on a link; plot them."""
    if why := why_not():
        yield Skipped("scaling on an emulated network", why)
        return
    bundle = demo_bundle("int4", console=settings.console)
    token_ms, prefill_ms, at_eight = [], [], list[StepRecord]()
    for count in _NODES:
        nodes = {f"node{k}": f"L*:E{k * _EXPERTS // count}-{(k + 1) * _EXPERTS // count - 1}" for k in range(count)}
        with running(settings, bundle, nodes=nodes, links=[Links(_RTT_MS)]) as system:
            parts = Parts(bundle, system.station.model.trunk, past_tokens=48)
            parts.measure()
            steps = [step for prompt in PROMPTS[:3] for step in decode(system, prompt, tokens=_TOKENS)]
            parts.measure()
            prefills = [prefill(system, _PREFILL_TOKENS, together=True)["total"] for _ in range(4)][1:]
        at_eight = steps
        ours, floor = (
            [step.total_ns / 1e6 for step in steps],
            [floor_ms(step, FloorLink(_RTT_MS, DEDICATED_MBPS), parts.alone()) for step in steps],
        )
        token_ms.append(statistics.median(ours))
        prefill_ms.append(statistics.median(prefills))
        parameters: dict[str, object] = {"nodes": count, "rtt_ms": _RTT_MS, "mbps": DEDICATED_MBPS}
        parameters[f"prefill_{_PREFILL_TOKENS}_ms"] = prefills
        yield Row(
            f"decode, {_RTT_MS:g} ms round trip, {count} nodes", "links, experts, trunk and head alone",
            ours, floor, None, parameters,
        )  # fmt: skip
    _keep(settings, "scaling-nodes", "nodes", _NODES, {"token": token_ms, f"prefill {_PREFILL_TOKENS}": prefill_ms})
    _keep(settings, "scaling-layers", "layers", *_by_layer(at_eight), fitted=True)
    sizes_ms: dict[str, list[float]] = {}
    with open_broker(settings.broker) as address, echoes(address, LOOPBACK) as ways:
        yield from _sizes(settings, "loopback", sizes_ms, ways)
    with link(settings) as ways:
        yield from _sizes(settings, "50 Mbit/s, 2 ms", sizes_ms, ways)
    _keep(settings, "scaling-bytes", "KiB", _KIB, sizes_ms, fitted=True, logarithmic=True)


def _sizes(
    settings: Settings, where: str, found: dict[str, list[float]], ways: tuple[Transport, socket.socket]
) -> Iterator[Row]:
    few = replace(settings, samples=max(30, settings.samples // 5))
    for kib in _KIB:
        row = compare(few, where, *ways, max(1, kib // 8), min(kib, 8) * 512)
        found.setdefault(f"frames over MQTT, {where}", []).append(statistics.median(row.ours_ms))
        found.setdefault(f"plain TCP, {where}", []).append(statistics.median(row.floor_ms))
        yield row


def _by_layer(steps: Sequence[StepRecord]) -> tuple[Sequence[int], dict[str, list[float]]]:
    """Median time of the first n layers of a token plus the head, for each n."""
    passed = [
        [
            step.head_ns / 1e6 + ms
            for ms in itertools.accumulate((layer.trunk_ns + layer.dispatch_ns) / 1e6 for layer in step.layers)
        ]
        for step in steps
    ]
    medians = [statistics.median(column) for column in zip(*passed, strict=True)]
    return range(1, len(medians) + 1), {"token": medians}


def _keep(
    settings: Settings, name: str, x_name: str, x: Sequence[float], series: dict[str, list[float]],
    *, fitted: bool = False, logarithmic: bool = False,
) -> None:  # fmt: skip
    """Write a plot and its CSV; with `fitted`, fit a line to each series, and print its equation also in the legend."""
    settings.folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(settings.folder / f"{name}.csv") as file:
        rows = [[x_name, *(f"{key} ms" for key in series)], *zip(x, *series.values(), strict=True)]
        file.write("".join(",".join(_cell(v) for v in row) + "\n" for row in rows).encode())
    with plot(settings, name) as axes:
        for key, y in series.items():
            label = key
            if fitted:
                fit = fit_line(x, y, relative=logarithmic)
                label = f"{key}: {fit.intercept:.2f} + {fit.slope:.4g} · {x_name} ms (R² {fit.r2:.3f})"
                settings.console.print(label, highlight=False)
                axes.plot(x, [fit.intercept + fit.slope * v for v in x], color="0.7", linewidth=1, zorder=1)
            axes.plot(x, y, "o" if fitted else "o-", markersize=4, label=label)
        axes.set_xlabel(x_name)
        axes.set_ylabel("ms")
        if logarithmic:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)


def _cell(value: float | str) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return f'"{text}"' if "," in text else text
