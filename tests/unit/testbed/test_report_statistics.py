"""Intervals against references that share no code with them."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from testbed.statistics import (
    Float,
    Interval,
    Proportion,
    Quantile,
    Ratio,
    Share,
    between_runs,
    difference,
    measured,
    ratio,
)


def _lognormal(answers: int, seed: int) -> list[Float]:
    """Token times of some answers, each of which is slow or fast as a whole."""
    rng = np.random.default_rng(seed)
    return [rng.lognormal(4 + rng.normal(0, 0.2), 0.2, rng.integers(5, 40)) for _ in range(answers)]


def _mean(answers: list[Float]) -> Ratio:
    return Ratio(np.array([a.sum() for a in answers]), np.array([float(len(a)) for a in answers]))


def _holds(interval: Interval | None, truth: float) -> bool:
    assert interval is not None
    assert interval.low is not None
    assert interval.high is not None
    return interval.low <= truth <= interval.high


def test_an_interval_is_the_widened_percentile_bootstrap_of_whole_answers() -> None:
    answers = _lognormal(30, 1)
    rng = np.random.default_rng(99)
    means = []
    for _ in range(4000):
        drawn = np.concatenate([answers[i] for i in rng.integers(0, 30, 30)])
        means.append(drawn.mean())
    low, high = np.quantile(means, [0.025, 0.975])
    found = measured(_mean(answers), seed=0, resamples=4000)
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    assert found.value == pytest.approx(np.concatenate(answers).mean())
    wider = 2.045 / 1.96 * np.sqrt(30 / 29)
    low, high = found.value * (low / found.value) ** wider, found.value * (high / found.value) ** wider
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.05 * (high - low))
    assert found.units == 30


def test_intervals_cover_although_tokens_of_an_answer_are_dependent() -> None:
    truth = np.exp(4 + 0.2**2)  # of two lognormal factors with σ = 0.2, each e^(σ²/2)
    held = token_held = 0
    for seed in range(400):
        answers = _lognormal(20, 1000 + seed)
        held += _holds(measured(_mean(answers), seed=0, resamples=400), truth)
        tokens = np.concatenate(answers)
        token_held += abs(tokens.mean() - truth) <= 1.96 * tokens.std() / np.sqrt(len(tokens))
    assert 0.91 <= held / 400 <= 0.98
    assert token_held / 400 < 0.6  # what an interval over tokens would have been worth


@pytest.mark.parametrize(("spread", "least"), [("normal", 0.915), ("lognormal", 0.87)])
@pytest.mark.parametrize("units", [5, 8])
def test_intervals_of_few_units_are_wide_enough(units: int, spread: str, least: float) -> None:
    """Percentiles alone hold 0.79 to 0.90. 400 trials spread by 0.012 around the shares in docs/measurement.md."""
    rng = np.random.default_rng(units)
    ones = np.ones(units)
    held = dict.fromkeys(("mean", "ratio", "difference", "apart"), 0)
    mean = 1.0 if spread == "normal" else np.exp(0.125)

    def draw() -> Float:
        return rng.normal(1, 0.2, units) if spread == "normal" else rng.lognormal(0, 0.5, units)

    for seed in range(400):
        base, other = draw(), draw()
        mine = base * 0.8 * rng.normal(1, 0.1, units)
        measure, baseline, apart = (Ratio(part, ones) for part in (mine, base, other))
        held["mean"] += _holds(measured(baseline, seed=seed, resamples=400), mean)
        held["ratio"] += _holds(ratio(measure, baseline, seed=seed, resamples=400), 0.8)
        held["difference"] += _holds(difference(measure, baseline, seed=seed, resamples=400), -0.2 * mean)
        held["apart"] += _holds(between_runs(apart, baseline, subtract=False, seed=seed, resamples=400), 1.0)
    assert min(held.values()) / 400 >= least, held


@pytest.mark.parametrize(("right", "items"), [(0, 20), (20, 20), (3, 7), (117, 200)])
def test_accuracy_has_wilsons_interval(right: int, items: int) -> None:
    marks = np.repeat([1.0, 0.0], [right, items - right])
    found = measured(Proportion(marks, np.ones(items), 100.0), seed=0)
    assert found is not None
    wilson = scipy.stats.binomtest(right, items).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((100 * wilson.low, 100 * wilson.high), abs=0.01)
    assert found.units == items
    # Repetitions of a question are no more questions.
    twice = measured(Proportion(2 * marks, np.full(items, 2.0), 100.0), seed=0)
    assert twice == found


@pytest.mark.parametrize("items", [16, 50, 200])
@pytest.mark.parametrize(("gained", "lost"), [(0.0, 0.0), (0.02, 0.05), (0.1, 0.15)])
def test_intervals_of_accuracy_differences_cover(items: int, gained: float, lost: float) -> None:
    rng = np.random.default_rng(items)
    ones = np.ones(items)
    held = apart = 0
    for _ in range(600):
        base = rng.random(items) < 0.6
        flip = rng.random(items)
        # Of those that are wrong some become right, and the other way round.
        mine = np.where(base, flip >= lost / 0.6, flip < gained / 0.4)
        other = rng.random(items) < 0.6 + gained - lost
        measure, baseline, first = (Proportion(marks.astype(float), ones) for marks in (mine, base, other))
        held += _holds(difference(measure, baseline, seed=0), gained - lost)
        apart += _holds(between_runs(first, baseline, subtract=True, seed=0), gained - lost)
    assert held / 600 >= 0.93
    assert apart / 600 >= 0.92
    same = difference(Proportion(ones, ones), Proportion(ones, ones), seed=0)
    assert same is not None
    assert same.low is not None
    assert same.high is not None
    assert same.low < 0 == same.value < same.high


def test_intervals_stay_within_possible_values() -> None:
    parts = np.array([1.0, 1.0, 1.0, 1.0, 0.5, 0.1])
    share = measured(Share(parts, np.ones(6)), seed=0)
    assert share is not None
    assert share.high == 1.0
    times = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 50.0])
    for found in (
        measured(Ratio(times, np.ones(6)), seed=0),
        ratio(Ratio(times, times), Ratio(np.ones(6), times), seed=0),
    ):
        assert found is not None
        assert found.low is not None
        assert 0 < found.low < found.value


def test_a_high_quantile_has_an_interval_where_units_lie_beyond_it() -> None:
    answers = _lognormal(59, 4)
    for units, known in ((58, False), (59, True)):
        found = measured(Quantile(answers[:units], 0.95), seed=0, resamples=200)
        assert found is not None
        assert (found.low is not None) == known
    # What two policies share is not the question when they are compared on the same units.
    paired = ratio(Quantile(answers[:8], 0.95), Quantile(answers[:8], 0.95), seed=0, resamples=200)
    assert paired is not None
    assert paired.low == 1.0


@given(
    st.lists(st.lists(st.floats(0.1, 1e4), max_size=6), min_size=1, max_size=8).filter(any),
    st.floats(0.01, 0.99),
    st.integers(0, 2**32),
)
def test_a_quantile_of_drawn_answers_is_that_of_their_tokens(
    answers: list[list[float]], share: float, seed: int
) -> None:
    arrays = [np.array(a) for a in answers]
    draws = np.random.default_rng(seed).integers(0, len(arrays), (5, len(arrays)))
    found = Quantile(arrays, share).of(draws)
    for value, draw in zip(found, draws, strict=True):
        tokens = np.concatenate([arrays[i] for i in draw])
        if len(tokens):
            assert value in {np.quantile(tokens, min(1, share + e), method="inverted_cdf") for e in (0, 1e-8, -1e-8)}
        else:
            assert np.isnan(value)


@pytest.mark.parametrize(("share", "enough"), [(0.5, 10), (0.9, 63), (0.95, 129), (0.99, 658)])
def test_a_quantile_needs_values_beyond_it(share: float, enough: int) -> None:
    assert not Quantile([np.ones(enough - 1)], share).enough
    assert Quantile([np.ones(3), np.ones(enough - 3)], share).enough


def test_pairing_removes_what_both_share() -> None:
    answers = _lognormal(30, 2)
    slower = [a * 1.1 for a in answers]
    paired = ratio(_mean(slower), _mean(answers), seed=0)
    apart = between_runs(_mean(slower), _mean(answers), subtract=False, seed=0)
    assert paired is not None
    assert apart is not None
    assert (paired.low, paired.value, paired.high) == pytest.approx((1.1, 1.1, 1.1))
    assert apart.value == pytest.approx(1.1)
    assert apart.low is not None
    assert apart.high is not None
    assert apart.high - apart.low > 0.1
    same = difference(_mean(answers), _mean(answers), seed=0)
    assert same is not None
    assert (same.low, same.value, same.high) == (0, 0, 0)


def test_what_has_no_value_or_no_interval() -> None:
    ones, nought = np.ones(6), np.zeros(6)
    assert measured(Ratio(ones, nought), seed=0) is None
    assert measured(Ratio(np.empty(0), np.empty(0)), seed=0) is None
    assert ratio(Ratio(ones, ones), Ratio(nought, ones), seed=0) is None
    few = measured(Ratio(ones[:4], ones[:4]), seed=0)
    assert few is not None
    assert (few.value, few.low, few.high, few.units) == (1.0, None, None, 4)
    assert measured(_mean(_lognormal(9, 3)), seed=5) == measured(_mean(_lognormal(9, 3)), seed=5)
