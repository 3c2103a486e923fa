"""Rows of the benchmarks: samples of ours and of the floor, and their ratio."""

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
    """What all sections share.

    Attributes:
        broker: `embedded`, `mosquitto` or an URL, for what runs on loopback.
        samples: of a row whose sample takes a few milliseconds; rows of slower ones take fewer.
        folder: for plots and logs.
        stays_awake: cores do not sleep while they wait, see `common.cpu_idle`.
    """

    broker: str
    samples: int
    folder: Path
    console: Console
    stays_awake: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison.

    Attributes:
        floor: what `ours` is compared with.
        ours_ms, floor_ms: raw samples; sample k of one was taken beside sample k of the other.
        target: the ratio that is wanted at most.
        parameters: everything that the numbers depend on and the machine does not say.
        parts: milliseconds of what lies between floor and ours, by cause; medians or means, as `parameters` says.
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
        """Median of ours ÷ median of the floor."""
        return statistics.median(self.ours_ms) / statistics.median(self.floor_ms)

    def interval(self) -> tuple[float, float]:
        """95 % of the ratio: percentile bootstrap over samples, both arms drawn together; seeded."""
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


class Skipped(NamedTuple):
    """A row that this machine can't give, and why."""

    name: str
    why: str


Result = Row | Skipped


def in_turns(
    ours: Callable[[], object], floor: Callable[[], object], samples: int, *, warm_up: int = WARM_UP
) -> tuple[list[float], list[float]]:
    """Milliseconds that each call of `ours` and of `floor` takes; which of them goes first changes every time."""
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
    """Matplotlib axes, saved as `<name>.svg` at the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    yield figure.add_subplot()
    settings.folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(settings.folder / f"{name}.svg")
