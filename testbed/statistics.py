"""Statistics of units that can be drawn again: answers, batches or items, never their single tokens.

The tokens of one answer share its prompt, its moment and its luck, so an interval from resampled tokens would be too
narrow. Every statistic here is a function of *which units were drawn*. Its interval is SciPy's percentile bootstrap
over them, seeded, so that equal data give equal intervals, and widened for few units; items that are right or wrong
have intervals of their own, for a bootstrap of equal marks has no width. docs/measurement.md says how well all of them
cover.
"""

import math
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
_Z = 1.96
"""Standard errors on either side of a 95 % interval."""
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
class Share(Ratio):
    """Of what each unit has as a whole: no interval reaches beyond all of it."""


@dataclass(frozen=True, slots=True, eq=False)
class Proportion(Share):
    """Share of items that were right: units are items, independent of each other.

    Attributes:
        part, whole: how often each was right, of how many times.
    """

    @property
    def marks(self) -> Float:
        """float64 [units]: 1 right, 0 wrong, in between where repetitions differ."""
        return self.part / self.whole

    def limits(self) -> tuple[float, float]:
        """Of its 95 % interval (Wilson)."""
        share = float(self.part.sum() / self.whole.sum())
        low, high = wilson_interval(share * self.units, self.units)
        return low * self.scale, high * self.scale


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
        return sum(map(len, self.values)) >= _least_count(self.share, _CERTAINTY)

    @property
    def least_units(self) -> int:
        """How many units an interval takes: so many that one whole unit lies beyond the quantile in 95 % of samples.

        That is 5 for the median, 59 for p95: what fewer have never shown, no draw of them shows.
        """
        return max(LEAST_UNITS, _least_count(self.share, CONFIDENCE))

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


def _least_count(share: float, certainty: float) -> int:
    tail = max(share, 1 - share)
    return int(np.ceil(np.log(1 - certainty) / np.log(tail)))


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


def wilson_interval(right: float, count: int, z: float = _Z) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    share = right / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return centre - half, centre + half


def measured(measure: Measure, *, seed: int, resamples: int = RESAMPLES) -> Interval | None:
    """A measure's value with its interval; None where it has no value. What is measured is never negative."""

    def limits(value: float) -> tuple[float, float]:
        if isinstance(measure, Proportion):
            return measure.limits()
        low, high = _bootstrap(measure.of, value, (measure.units,), seed, resamples, positive=True)
        return low, min(high, measure.scale) if isinstance(measure, Share) else high

    return _interval(measure.of, (measure.units,), limits, least=_least_units(measure))


def difference(measure: Measure, baseline: Measure, *, seed: int, resamples: int = RESAMPLES) -> Interval | None:
    """Measure less baseline; unit k of one belongs to unit k of the other, and they are drawn together."""

    def less(draw: Draw) -> Float:
        return measure.of(draw) - baseline.of(draw)

    def limits(value: float) -> tuple[float, float]:
        if isinstance(measure, Proportion) and isinstance(baseline, Proportion):
            return _paired_limits(measure, baseline)
        return _bootstrap(less, value, (measure.units,), seed, resamples)

    return _interval(less, (measure.units,), limits)


def ratio(measure: Measure, baseline: Measure, *, seed: int, resamples: int = RESAMPLES) -> Interval | None:
    """Measure over baseline, paired as in `difference`; None where the baseline is zero."""

    def over(draw: Draw) -> Float:
        with np.errstate(divide="ignore", invalid="ignore"):
            value: Float = measure.of(draw) / baseline.of(draw)
        return value

    def limits(value: float) -> tuple[float, float]:
        return _bootstrap(over, value, (measure.units,), seed, resamples, positive=True)

    return _interval(over, (measure.units,), limits)


def between_runs(
    measure: Measure, first: Measure, *, subtract: bool, seed: int, resamples: int = RESAMPLES
) -> Interval | None:
    """Measure over, or less, that of another run; the units of two runs are drawn apart."""
    counts = measure.units, first.units

    def against(mine: Draw, theirs: Draw) -> Float:
        with np.errstate(divide="ignore", invalid="ignore"):
            a, b = measure.of(mine), first.of(theirs)
            value: Float = a - b if subtract else a / b
        return value

    def limits(value: float) -> tuple[float, float]:
        if subtract and isinstance(measure, Proportion) and isinstance(first, Proportion):
            return _apart_limits(measure, first)
        return _bootstrap(against, value, counts, seed, resamples, positive=not subtract)

    return _interval(against, counts, limits, least=max(_least_units(measure), _least_units(first)))


def _interval(
    statistic: Callable[..., Float],
    units: tuple[int, ...],
    limits: Callable[[float], tuple[float, float]],
    *,
    least: int = LEAST_UNITS,
) -> Interval | None:
    value = float(statistic(*map(np.arange, units))) if all(units) else float("nan")
    if not np.isfinite(value):
        return None
    if min(units) < least:
        return Interval(value, None, None, min(units))
    low, high = map(float, limits(value))
    # A draw without anything that counts (an answer of one token has none after the first) has no value.
    if not np.isfinite([low, high]).all():
        return Interval(value, None, None, min(units))
    return Interval(value, low, high, min(units))


def _least_units(measure: Measure) -> int:
    return measure.least_units if isinstance(measure, Quantile) else LEAST_UNITS


def _paired_limits(measure: Proportion, baseline: Proportion) -> tuple[float, float]:
    """Of the difference on the same items, from those that were gained and lost, one more of each (Bonett and Price
    2012): where none was, that is no proof that there are none."""
    change, count = measure.marks - baseline.marks, measure.units + 2
    gained, lost = (np.maximum(change, 0).sum() + 1) / count, (np.maximum(-change, 0).sum() + 1) / count
    centre, half = gained - lost, _Z * math.sqrt((gained + lost - (gained - lost) ** 2) / count)
    return max(-1.0, centre - half) * measure.scale, min(1.0, centre + half) * measure.scale


def _apart_limits(measure: Proportion, first: Proportion) -> tuple[float, float]:
    """Of the difference on different items, from both shares' intervals (Newcombe 1998)."""
    mine, theirs = (float(some.of(np.arange(some.units))) for some in (measure, first))
    (low, high), (their_low, their_high) = measure.limits(), first.limits()
    value = mine - theirs
    return value - math.hypot(mine - low, their_high - theirs), value + math.hypot(high - mine, theirs - their_low)


def _bootstrap(
    statistic: Callable[..., Float], value: float, units: tuple[int, ...], seed: int, resamples: int, *,
    positive: bool = False,
) -> tuple[float, float]:  # fmt: skip
    """Percentiles, widened around the value: what was drawn spreads by √((n − 1) / n) too little, and how much it
    spreads is known from n units only (Student). Two runs count as the smaller one.

    Args:
        positive: the statistic is never negative, and widened by a factor.
    """

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
    low, high = min(found.confidence_interval.low, value), max(found.confidence_interval.high, value)
    few = min(units)
    times = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, few - 1) / _Z * math.sqrt(few / (few - 1))
    if positive and value > 0:
        return value * (low / value) ** times, value * (high / value) ** times
    return value - times * (value - low), value + times * (high - value)
