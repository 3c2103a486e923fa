"""Statistics with intervals over whole units: answers, batches or items, never single tokens.

The tokens of one answer share its prompt and its moment, so an interval from resampled tokens would be too narrow.
Every statistic here is a function of *which units were drawn*. Its interval is SciPy's percentile bootstrap over the
units, seeded so that equal data give equal intervals, and widened for few units. Shares of right items have intervals
of their own, because a bootstrap of equal marks has no width. docs/measurement.md gives the coverage of all intervals.
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
"""Fewest units for an interval: with fewer, resampling only repeats the same few samples."""
_CERTAINTY = 0.99865
_CELLS_PER_BLOCK = 200_000
"""Size of the one matrix that grows with draws × values, chosen to fit into the CPU's cache."""


class _NoValueError(Exception):
    """A draw has no finite value: an answer of one token has no token after the first."""


class Measure(Protocol):
    """A statistic of units, as a function of the units drawn."""

    @property
    def units(self) -> int:
        """Number of units."""

    def of(self, draw: Draw) -> Float:
        """Value for each draw, float64 [...], of drawn units intp [..., units]."""


@dataclass(frozen=True, slots=True, eq=False)
class Ratio:
    """Σ part / Σ whole × scale over the drawn units: a mean per token or item, or a share.

    Attributes:
        part, whole: float64 [units].
        exponential: the value is e to the power of the ratio (perplexity).
    """

    part: Float
    whole: Float
    scale: float = 1.0
    exponential: bool = False

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.part)

    def of(self, draw: Draw) -> Float:
        """Value for each draw, float64 [...]; NaN where the drawn `whole` is zero."""
        # The loss of a broken model is so large, or infinite, that its perplexity is infinite.
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            value: Float = self.part[draw].sum(-1) / self.whole[draw].sum(-1) * self.scale
            return np.asarray(np.exp(value)) if self.exponential else value


@dataclass(frozen=True, slots=True, eq=False)
class Share(Ratio):
    """A ratio that can't exceed 1; its interval ends there."""


@dataclass(frozen=True, slots=True, eq=False)
class Proportion(Share):
    """Share of right items; units are items, which are independent of each other.

    Attributes:
        part, whole: float64 [units], how often each item was right, and how often it was answered.
    """

    @property
    def marks(self) -> Float:
        """float64 [units]: 1 is right, 0 is wrong, values between are repetitions that differ."""
        return self.part / self.whole

    def limits(self) -> tuple[float, float]:
        """Limits of the 95 % interval (Wilson 1927)."""
        share = float(self.part.sum() / self.whole.sum())
        low, high = wilson_interval(share * self.units, self.units)
        return low * self.scale, high * self.scale


@dataclass(frozen=True, slots=True, eq=False)
class Quantile:
    """Quantile by nearest rank of all values of the drawn units.

    Attributes:
        values: one array of values per unit.
        share: which quantile, such as 0.95.
    """

    values: Sequence[Float]
    share: float
    scale: float = 1.0

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.values)

    @property
    def enough(self) -> bool:
        """Whether there are enough values for one to lie beyond the quantile in all but 0.135 % of samples.

        That takes 10 values for the median, 129 for p95 and 662 for p99.
        """
        return sum(map(len, self.values)) >= _least_count(self.share, _CERTAINTY)

    @property
    def least_units(self) -> int:
        """Fewest units for an interval: enough for a whole unit to lie beyond the quantile in 95 % of samples.

        That takes 5 units for the median and 59 for p95. Resampling can't show values that fewer units never had.
        """
        return max(LEAST_UNITS, _least_count(self.share, CONFIDENCE))

    def of(self, draw: Draw) -> Float:
        """Value for each draw, float64 [...]; NaN where the drawn units have no values."""
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
        low, high: limits; None if there are too few units.
        units: number of units.
    """

    value: float
    low: float | None
    high: float | None
    units: int


def wilson_interval(right: float, count: int, z: float = _Z) -> tuple[float, float]:
    """95 % interval of the share of `right` in `count` (Wilson 1927)."""
    share = right / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)  # rounding may take them past the ends


def measured(measure: Measure, *, seed: int, resamples: int = RESAMPLES) -> Interval | None:
    """The value of a non-negative measure with its interval; None if it has no value."""

    def limits(value: float) -> tuple[float, float]:
        if isinstance(measure, Proportion):
            return measure.limits()
        low, high = _bootstrap(measure.of, value, (measure.units,), seed, resamples, positive=True)
        return low, min(high, measure.scale) if isinstance(measure, Share) else high

    return _interval(measure.of, (measure.units,), limits, least=_least_units(measure))


def difference(measure: Measure, baseline: Measure, *, seed: int, resamples: int = RESAMPLES) -> Interval | None:
    """Measure minus baseline, paired: unit k of one belongs to unit k of the other, and they are drawn together."""

    def less(draw: Draw) -> Float:
        with np.errstate(invalid="ignore"):  # of two infinite values
            value: Float = measure.of(draw) - baseline.of(draw)
        return value

    def limits(value: float) -> tuple[float, float]:
        if isinstance(measure, Proportion) and isinstance(baseline, Proportion):
            return _paired_limits(measure, baseline)
        return _bootstrap(less, value, (measure.units,), seed, resamples)

    return _interval(less, (measure.units,), limits)


def ratio(measure: Measure, baseline: Measure, *, seed: int, resamples: int = RESAMPLES) -> Interval | None:
    """Measure over baseline, paired as in `difference`; None if the baseline is zero."""

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
    """A measure against that of another run, whose units are drawn independently.

    Args:
        subtract: give the difference instead of the ratio.
    """
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
    if not np.isfinite([low, high]).all():
        return Interval(value, None, None, min(units))
    return Interval(value, low, high, min(units))


def _least_units(measure: Measure) -> int:
    return measure.least_units if isinstance(measure, Quantile) else LEAST_UNITS


def _paired_limits(measure: Proportion, baseline: Proportion) -> tuple[float, float]:
    """Limits of the difference on the same items (Bonett and Price 2012).

    One gained and one lost item are added: none among these items doesn't prove that there are none at all.
    """
    change, count = measure.marks - baseline.marks, measure.units + 2
    gained, lost = (np.maximum(change, 0).sum() + 1) / count, (np.maximum(-change, 0).sum() + 1) / count
    centre, half = gained - lost, _Z * math.sqrt((gained + lost - (gained - lost) ** 2) / count)
    return max(-1.0, centre - half) * measure.scale, min(1.0, centre + half) * measure.scale


def _apart_limits(measure: Proportion, first: Proportion) -> tuple[float, float]:
    """Limits of the difference on different items, from the intervals of both shares (Newcombe 1998)."""
    mine, theirs = (float(some.of(np.arange(some.units))) for some in (measure, first))
    (low, high), (their_low, their_high) = measure.limits(), first.limits()
    value = mine - theirs
    return value - math.hypot(mine - low, their_high - theirs), value + math.hypot(high - mine, theirs - their_low)


def _bootstrap(
    statistic: Callable[..., Float], value: float, units: tuple[int, ...], seed: int, resamples: int, *,
    positive: bool = False,
) -> tuple[float, float]:  # fmt: skip
    """Limits of a percentile bootstrap, widened around the value for few units; NaN if a draw has no finite value.

    Resampled means spread too little by √((n − 1) / n), and the spread is known from n units only (Student's t). For
    two runs, n is the smaller number of units.

    Args:
        positive: the statistic is never negative: widen by a factor instead of an amount.
    """

    def along_last(*draws: NDArray[np.float64], axis: int) -> Float:
        value = statistic(*(np.moveaxis(draw, axis, -1) for draw in draws))
        if not np.isfinite(value).all():
            raise _NoValueError
        return value

    try:
        with np.errstate(over="ignore"):  # of the squares for a standard error, which is not used
            found = scipy.stats.bootstrap(
                tuple(np.arange(count) for count in units),
                along_last,
                n_resamples=resamples,
                vectorized=True,
                confidence_level=CONFIDENCE,
                method="percentile",
                rng=np.random.default_rng(seed),
            )
    except _NoValueError:
        return math.nan, math.nan
    low, high = min(found.confidence_interval.low, value), max(found.confidence_interval.high, value)
    few = min(units)
    times = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, few - 1) / _Z * math.sqrt(few / (few - 1))
    if positive and value > 0:
        with np.errstate(over="ignore"):
            return value * np.float64(low / value) ** times, value * np.float64(high / value) ** times
    return value - times * (value - low), value + times * (high - value)
