"""Moving averages, against the mean of geometric weights that they stand for."""

import numpy as np
import pytest

from common.moving_average import MovingAverage

SEEN = (5.0, 7.0, 1.0)


def test_older_observations_count_less() -> None:
    average = MovingAverage(0.5, 8.0)
    means = [average.add(value) for value in SEEN]
    assert means[-1] == average.value == pytest.approx(np.dot((0.125, 0.125, 0.25, 0.5), (8.0, *SEEN)))


def test_without_a_value_the_first_observation_is_the_first_mean() -> None:
    average = MovingAverage(0.5, None)
    assert average.value == 0.0
    assert average.add(10.0, 2) == 5.0
    assert average.add(0.0) == 2.5
