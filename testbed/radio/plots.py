"""Plots of a simulation, each with its data as CSV."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from common.files import atomic_write
from testbed.radio.replay import ALLOCATIONS, PHASES
from testbed.radio.results import Latency
from testbed.radio.sensitivity import Point
from testbed.statistics import Interval

_STYLE: Any = {"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True, "figure.dpi": 120}
# The palette of Okabe and Ito, distinguishable with colour-blindness.
_COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#999999", "#F0E442")
_MARKERS = "osD^vPX*<"


def draw_latency(rows: Sequence[Latency], folder: Path) -> None:
    """Draw the mean time per token by policy and allocation: `latency.png` and `latency.csv`."""
    _write_csv(
        folder / "latency.csv",
        ("phase", "policy", "allocation", "mean_ms", "low_ms", "high_ms", "median_ms", "saved", "dropped"),
        ((r.phase, r.policy, r.allocation, *_ends(r.mean_ms), r.median_ms, r.saved.value, r.dropped) for r in rows),
    )
    policies = list(dict.fromkeys(row.policy for row in rows))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 1.2 + 0.5 * len(policies)), layout="constrained")
        for axis, phase in zip(figure.subplots(1, len(PHASES)), PHASES, strict=True):
            for i, allocation in enumerate(ALLOCATIONS):
                some = [row for row in rows if (row.phase, row.allocation) == (phase, allocation)]
                at = [policies.index(row.policy) + (i - 1) * 0.27 for row in some]
                mean = [row.mean_ms.value for row in some]
                spread = [
                    [r.mean_ms.value - (r.mean_ms.low or r.mean_ms.value) for r in some],
                    [(r.mean_ms.high or r.mean_ms.value) - r.mean_ms.value for r in some],
                ]
                axis.barh(at, mean, height=0.25, xerr=spread, color=_COLOURS[i + 1], label=allocation)
            axis.set_yticks(range(len(policies)), policies)
            axis.invert_yaxis()
            axis.set(title=phase, xlabel="mean time per token waiting for devices, ms")
        figure.axes[-1].legend(title="bandwidth")
        _write_png(figure, folder / "latency.png")


def draw_sensitivity(points: Sequence[Point], folder: Path) -> None:
    """Draw time saved and pairs dropped over θ, with a line per γ: `sensitivity.png` and `sensitivity.csv`."""
    _write_csv(
        folder / "sensitivity.csv",
        ("theta", "gain", "allocation", "mean_ms", "saved", "saved_low", "saved_high", "dropped"),
        (
            (p.theta, p.gain or "fixed", r.allocation, r.mean_ms.value, *_ends(r.saved), r.dropped)
            for p in points
            for r in p.latencies
        ),
    )
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        saved, dropped = figure.subplots(1, 2)
        for i, gain in enumerate(dict.fromkeys(p.gain for p in points)):
            line = [p for p in points if p.gain == gain]
            theta = [p.theta for p in line]
            style = {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)], "markersize": 4}
            label = "θ fixed" if gain is None else f"γ = {gain:g}"
            saved.plot(theta, [100 * p.latencies[0].saved.value for p in line], label=label, **style)
            dropped.plot(theta, [100 * p.latencies[0].dropped for p in line], label=label, **style)
        saved.set(xlabel="θ₀", ylabel="time saved against top-k, %", title="equal shares of bandwidth")
        dropped.set(xlabel="θ₀", ylabel="pairs dropped, %")
        dropped.legend()
        _write_png(figure, folder / "sensitivity.png")


def _ends(interval: Interval) -> tuple[float | None, ...]:
    return interval.value, interval.low, interval.high


def _write_png(figure: Figure, path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())
