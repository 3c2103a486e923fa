"""Rows of the benchmarks: samples of our code and of the floor, and their ratio."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

WARM_UP = 20
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings for all sections.

    Attributes:
        broker: `embedded`, `mosquitto` or a URL, for benchmarks on loopback.
        samples: samples per row if a sample takes a few milliseconds; slower rows take fewer.
        folder: folder for plots and logs.
        console: where to print.
        busy: busy processes beside which the section `load` decodes.
        stays_awake: whether CPU idle states are disabled (`common.cpu_idle`).
        checkpoint: folder of the checkpoint that the section `export` exports; None for a small one of random weights.
        device: of the trunk, in sections that decode on an emulated network.
    """

    broker: str
    samples: int
    folder: Path
    console: Console
    busy: int = 8
    stays_awake: bool = False
    checkpoint: Path | None = None
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Row:
    """A comparison of our code with a floor.

    Attributes:
        name: what was measured.
        floor: name of the floor.
        ours_ms, floor_ms: raw samples; sample k of both was taken in the same turn.
        target: largest acceptable ratio; None for no target.
        parameters: parameters of the measurement.
        parts: milliseconds between floor and ours by cause, medians or means as described in `parameters`.
    """

    name: str
    floor: str
    ours_ms: Sequence[float]
    floor_ms: Sequence[float]
    target: float | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Median of ours divided by the median of the floor."""
        return statistics.median(self.ours_ms) / statistics.median(self.floor_ms)

    def interval(self) -> tuple[float, float]:
        """95 % interval of the ratio: seeded percentile bootstrap, with samples of equal number resampled in pairs."""
        ours, floor = np.asarray(self.ours_ms), np.asarray(self.floor_ms)
        rng = np.random.default_rng(0)
        if len(ours) == len(floor):
            draw = rng.integers(len(ours), size=(_RESAMPLES, len(ours)))
            ratios = np.median(ours[draw], axis=1) / np.median(floor[draw], axis=1)
        else:
            ours, floor = (a[rng.integers(len(a), size=(_RESAMPLES, len(a)))] for a in (ours, floor))
            ratios = np.median(ours, axis=1) / np.median(floor, axis=1)
        low, high = np.quantile(ratios, [0.025, 0.975])
        return float(low), float(high)


@dataclass(frozen=True, slots=True)
class Throughput:
    """Tokens per second, without a floor.

    Attributes:
        name: what was measured.
        tokens_per_s: of each repetition, two at least.
        parameters: parameters of the measurement.
    """

    name: str
    tokens_per_s: Sequence[float]
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean of the repetitions."""
        return statistics.mean(self.tokens_per_s)

    @property
    def deviation(self) -> float:
        """Their sample standard deviation (n − 1)."""
        return statistics.stdev(self.tokens_per_s)


class Skipped(NamedTuple):
    """A row that can't be measured on this machine, and why."""

    name: str
    why: str


Result = Row | Throughput | Skipped


def in_turns(
    ours: Callable[[], object], floor: Callable[[], object], samples: int, *, warm_up: int = WARM_UP
) -> tuple[list[float], list[float]]:
    """Call `ours` and `floor` alternately, and return the milliseconds of each call; the order changes every time."""
    ours_ms: list[float] = []
    floor_ms: list[float] = []
    arms = [(ours, ours_ms), (floor, floor_ms)]
    for i in range(warm_up + samples):
        for call, kept in arms if i % 2 else reversed(arms):
            began = time.perf_counter_ns()
            call()
            if i >= warm_up:
                kept.append((time.perf_counter_ns() - began) / 1e6)
    return ours_ms, floor_ms


@contextmanager
def plot(settings: Settings, name: str) -> Iterator[Any]:
    """Matplotlib axes, saved as `<name>.svg` when the context ends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    yield figure.add_subplot()
    settings.folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(settings.folder / f"{name}.svg")
