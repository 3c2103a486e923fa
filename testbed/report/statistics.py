"""Statistics of units that can be drawn again: answers, batches or items, never their single tokens.

The tokens of one answer share its prompt, its moment and its luck, so an interval from resampled tokens would be too
narrow. Every statistic here is a function of *which units were drawn*; `interval` is SciPy's percentile bootstrap
over them, seeded, so that equal data give equal intervals.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import scipy.stats
from numpy.typing import NDArray

Float = NDArray[np.float64]
Draw = NDArray[np.intp]
"""intp [..., units]: indices of drawn units."""
RESAMPLES = 2000
CONFIDENCE = 0.95
LEAST_UNITS = 5
"""Fewer draw the same few samples again and again: an interval would only look like one."""
_CERTAINTY = 0.99865
_CELLS_PER_BLOCK = 200_000
"""Of the one matrix that grows with draws × values: it stays in the CPU's cache."""


class Measure(Protocol):
    """A statistic of units."""

    @property
    def units(self) -> int:
        """How many there are."""

    def of(self, draw: Draw) -> Float:
        """Its value for each draw: float64 [...]."""


@dataclass(frozen=True, slots=True, eq=False)
class Ratio:
    """Σ part / Σ whole × scale over the drawn units: a mean per token, a share, a mean per item.

    Attributes:
        part, whole: float64 [units].
        exponential: take e to the power of it (perplexity).
    """

    part: Float
    whole: Float
    scale: float = 1.0
    exponential: bool = False

    @property
    def units(self) -> int:
        """See `Measure`."""
        return len(self.part)

    def of(self, draw: Draw) -> Float:
        """See `Measure`; NaN where nothing was drawn that counts."""
        with np.errstate(divide="ignore", invalid="ignore"):
            value: Float = self.part[draw].sum(-1) / self.whole[draw].sum(-1) * self.scale
        return np.asarray(np.exp(value)) if self.exponential else value


@dataclass(frozen=True, slots=True, eq=False)
class Quantile:
    """Quantile by nearest rank of all values of the drawn units.

    Attributes:
        values: one array per unit.
    """

    values: Sequence[Float]
    share: float
    scale: float = 1.0

    @property
    def units(self) -> int:
        """See `Measure`."""
        return len(self.values)

    @property
    def enough(self) -> bool:
        """Whether there are so many values that, but for 0.135 % of samples, one lies beyond the quantile.

        That is 10 for the median, 129 for p95, 662 for p99.
        """
        return sum(map(len, self.values)) >= _least_count(self.share)

    def of(self, draw: Draw) -> Float:
        """See `Measure`."""
        pooled = np.concatenate([*self.values, np.empty(0)])
        owner = np.repeat(np.arange(self.units), [len(v) for v in self.values])
        if not len(pooled):
            return np.full(draw.shape[:-1], np.nan)
        order = np.argsort(pooled, kind="stable")
        value = np.empty(draw.shape[:-1])
        for where in _blocks(value.size, _CELLS_PER_BLOCK // len(pooled)):
            flat = draw.reshape(-1, draw.shape[-1])[where]
            times = np.zeros((len(flat), self.units))
            np.add.at(times, (np.arange(len(flat))[:, None], flat), 1.0)
            upto = np.cumsum(times[:, owner[order]], axis=1)
            rank = np.argmax(upto >= self.share * upto[:, -1:] - 1e-9, axis=1)
            value.reshape(-1)[where] = np.where(upto[:, -1] > 0, pooled[order][rank], np.nan)
        return value * self.scale


def _blocks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, max(1, size)):
        yield slice(start, start + max(1, size))


def _least_count(share: float) -> int:
    tail = max(share, 1 - share)
    return int(np.ceil(np.log(1 - _CERTAINTY) / np.log(tail)))


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and its 95 % interval.

    Attributes:
        low, high: None where there are too few units for one.
        units: what was resampled, how many.
    """

    value: float
    low: float | None
    high: float | None
    units: int


def measured(measure: Measure, *, seed: int, resamples: int = RESAMPLES) -> Interval | None:
    """A measure's value with its interval; None where it has no value."""
    return _interval(measure.of, measure.units, seed, resamples)


def difference(measure: Measure, baseline: Measure, *, seed: int, resamples: int = RESAMPLES) -> Interval | None:
    """Measure less baseline; unit k of one belongs to unit k of the other, and they are drawn together."""
    return _interval(lambda draw: measure.of(draw) - baseline.of(draw), measure.units, seed, resamples)


def ratio(measure: Measure, baseline: Measure, *, seed: int, resamples: int = RESAMPLES) -> Interval | None:
    """Measure over baseline, paired as in `difference`; None where the baseline is zero."""

    def over(draw: Draw) -> Float:
        with np.errstate(divide="ignore", invalid="ignore"):
            value: Float = measure.of(draw) / baseline.of(draw)
        return value

    return _interval(over, measure.units, seed, resamples)


def between_runs(
    measure: Measure, first: Measure, *, subtract: bool, seed: int, resamples: int = RESAMPLES
) -> Interval | None:
    """Measure over, or less, that of another run; the units of two runs are drawn apart."""

    def against(mine: Draw, theirs: Draw) -> Float:
        with np.errstate(divide="ignore", invalid="ignore"):
            a, b = measure.of(mine), first.of(theirs)
            value: Float = a - b if subtract else a / b
        return value

    counts = measure.units, first.units
    value = float(against(*map(np.arange, counts))) if all(counts) else float("nan")
    if not np.isfinite(value):
        return None
    low, high = _bootstrap(against, counts, seed, resamples)
    return Interval(value, low, high, min(counts))


def _interval(statistic: Callable[[Draw], Float], units: int, seed: int, resamples: int) -> Interval | None:
    value = float(statistic(np.arange(units))) if units else float("nan")
    if not np.isfinite(value):
        return None
    low, high = _bootstrap(statistic, (units,), seed, resamples)
    return Interval(value, low, high, units)


def _bootstrap(
    statistic: Callable[..., Float], units: tuple[int, ...], seed: int, resamples: int
) -> tuple[float | None, float | None]:
    if min(units) < LEAST_UNITS:
        return None, None

    def along_last(*draws: NDArray[np.float64], axis: int) -> Float:
        return statistic(*(np.moveaxis(draw, axis, -1) for draw in draws))

    found = scipy.stats.bootstrap(
        tuple(np.arange(count) for count in units),
        along_last,
        n_resamples=resamples,
        vectorized=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = float(found.confidence_interval.low), float(found.confidence_interval.high)
    # A draw without anything that counts (an answer of one token has none after the first) has no value.
    return (low, high) if np.isfinite([low, high]).all() else (None, None)
