"""Intervals against references that share no code with them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.report.statistics import Float, Quantile, Ratio, between_runs, difference, measured, ratio


def _lognormal(answers: int, seed: int) -> list[Float]:
    """Token times of some answers, each of which is slow or fast as a whole."""
    rng = np.random.default_rng(seed)
    return [rng.lognormal(4 + rng.normal(0, 0.2), 0.2, rng.integers(5, 40)) for _ in range(answers)]


def _mean(answers: list[Float]) -> Ratio:
    return Ratio(np.array([a.sum() for a in answers]), np.array([float(len(a)) for a in answers]))


def test_an_interval_is_the_percentile_bootstrap_of_whole_answers() -> None:
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
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.1 * (high - low))
    assert found.units == 30


def test_intervals_hold_what_they_promise_though_tokens_depend_on_their_answer() -> None:
    truth = np.exp(4 + 0.2**2)  # of two lognormal factors with σ = 0.2, each e^(σ²/2)
    held = token_held = 0
    for seed in range(200):
        answers = _lognormal(40, 1000 + seed)
        found = measured(_mean(answers), seed=0, resamples=400)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        held += found.low <= truth <= found.high
        tokens = np.concatenate(answers)
        token_held += abs(tokens.mean() - truth) <= 1.96 * tokens.std() / np.sqrt(len(tokens))
    assert held / 200 >= 0.88
    assert token_held / 200 < 0.6  # what an interval over tokens would have been worth


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
