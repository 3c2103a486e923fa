"""Bandwidth allocation against SciPy's general solvers, and against what must hold for any optimum."""

from typing import Any, NamedTuple

import numpy as np
import pytest
from scipy.optimize import brentq, minimize

from bs_coordinator.airtime.allocation import (
    Float,
    ShannonLinks,
    ShareLinks,
    allocate_common,
    allocate_layer,
    layer_seconds,
)

TOTAL_HZ = 100e6


class Instance(NamedTuple):
    links: ShannonLinks
    rows: Float
    fixed_s: Float

    def seconds(self, bandwidth: Float) -> Float:
        """Each layer's, [layers]; bandwidth [nodes] or [layers, nodes]."""
        return layer_seconds(self.links.each_layer(), np.atleast_2d(bandwidth), self.rows, self.fixed_s)


def random_instance(seed: int, layers: int | None = None) -> Instance:
    """Links from far below to far above the noise, some nodes not asked."""
    rng = np.random.default_rng(seed)
    layers, nodes = layers or int(rng.integers(1, 31)), int(rng.integers(2, 9))
    down_hz = 10 ** rng.uniform(6, 12, nodes)
    rows: Float = rng.integers(0, 60, (layers, nodes)).astype(np.float64) * (rng.random((layers, nodes)) < 0.7)
    rows[np.arange(layers), rng.integers(0, nodes, layers)] += 1
    links = ShannonLinks(576 * 16, down_hz, down_hz * 10 ** rng.uniform(-3, 0, nodes))
    return Instance(links, rows, np.asarray(rows * rng.uniform(0, 1e-4, nodes)))


def scipy_sum_s(instance: Instance) -> float:
    """The least sum over layers that SLSQP finds on the epigraph form, with the allocation made feasible."""
    links, rows, fixed_s = instance
    layers, nodes = rows.shape
    equal_s = instance.seconds(np.full(nodes, TOTAL_HZ / nodes))
    unit_s = equal_s.sum()
    layer, node = np.nonzero(rows)

    def row_s(share: Float) -> Float:
        """Written down anew, from the definition of Shannon's rate."""
        hz = np.maximum(share, 1e-9) * TOTAL_HZ
        bits = links.row_bits
        return np.asarray(bits / (hz * np.log2(1 + links.down_hz / hz)) + bits / (hz * np.log2(1 + links.up_hz / hz)))

    def total(x: Float) -> float:
        return float(x[nodes:].sum())

    def slack(x: Float) -> Float:
        load = (fixed_s + rows * row_s(x[:nodes])) / unit_s
        return np.asarray((x[nodes:, None] - load)[layer, node])

    def slack_jacobian(x: Float) -> Float:
        step = 1e-6 * np.maximum(x[:nodes], 1e-6)
        slope = (row_s(x[:nodes] + step) - row_s(x[:nodes] - step)) / (2 * step) / unit_s
        jacobian = np.zeros((len(layer), nodes + layers))
        jacobian[np.arange(len(layer)), node] = -(rows * slope)[layer, node]
        jacobian[np.arange(len(layer)), nodes + layer] = 1
        return jacobian

    budget = np.concatenate([-np.ones(nodes), np.zeros(layers)])
    arguments: dict[str, Any] = {
        "method": "SLSQP",
        "jac": lambda x: 1 + budget * (budget < 0),
        "bounds": [(1e-6, 1)] * nodes + [(0, None)] * layers,
        "constraints": [
            {"type": "ineq", "fun": slack, "jac": slack_jacobian},
            {"type": "ineq", "fun": lambda x: 1 + x @ budget, "jac": lambda x: budget},
        ],
        "options": {"maxiter": 1000, "ftol": 1e-13},
    }
    share, seconds = np.full(nodes, 1 / nodes), equal_s
    least_s = float(unit_s)
    for _ in range(8):  # badly scaled instances need fresh starts, with room in every constraint
        x = minimize(total, np.concatenate([share, 1.1 * seconds / unit_s]), **arguments).x
        share = x[:nodes] / x[:nodes].sum()
        seconds = instance.seconds(share * TOTAL_HZ)
        least_s = min(least_s, float(seconds.sum()))
    return least_s


@pytest.mark.parametrize("seed", range(12))
def test_common_allocation_agrees_with_scipy(seed: int) -> None:
    instance = random_instance(seed)
    bandwidth = allocate_common(*instance, TOTAL_HZ)
    assert instance.seconds(bandwidth).sum() == pytest.approx(scipy_sum_s(instance), rel=1e-6)
    assert bandwidth.sum() == pytest.approx(TOTAL_HZ, rel=1e-12)
    assert (bandwidth >= 0).all()
    assert (bandwidth[~instance.rows.any(axis=0)] == 0).all()


@pytest.mark.parametrize("seed", range(12))
def test_layer_allocation_agrees_with_scipy(seed: int) -> None:
    instance = random_instance(100 + seed, layers=1)
    bandwidth = allocate_layer(instance.links.each_layer(), instance.rows, instance.fixed_s, TOTAL_HZ)
    asked = np.flatnonzero(instance.rows[0])

    def needed_hz(time_s: float) -> float:
        """What all asked nodes need to be done by then, each found by SciPy."""
        total_hz = 0.0
        for k in asked:
            one = ShannonLinks(instance.links.row_bits, instance.links.down_hz[[k]], instance.links.up_hz[[k]])
            row_s = (time_s - instance.fixed_s[0, k]) / instance.rows[0, k]

            def late(log_hz: float, one: ShannonLinks = one, row_s: float = row_s) -> float:
                return float(np.log(one.row_time(np.exp(np.array([log_hz]))).seconds[0] / row_s))

            total_hz += np.exp(brentq(late, -10, np.log(2 * TOTAL_HZ), xtol=1e-14))
        return total_hz

    whole_s = float(instance.seconds(np.full(instance.rows.shape, TOTAL_HZ))[0])
    equal_s = float(instance.seconds(np.full(instance.rows.shape, TOTAL_HZ / len(asked)))[0])
    best_s = equal_s
    if len(asked) > 1:
        best_s = brentq(lambda t: np.log(needed_hz(t) / TOTAL_HZ), whole_s * (1 + 1e-12), equal_s, xtol=1e-16)
    assert instance.seconds(bandwidth)[0] == pytest.approx(best_s, rel=1e-6)
    assert bandwidth.sum() == pytest.approx(TOTAL_HZ, rel=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_layer_and_common_allocation_agree_on_a_single_layer(seed: int) -> None:
    instance = random_instance(200 + seed, layers=1)
    alone = allocate_layer(instance.links.each_layer(), instance.rows, instance.fixed_s, TOTAL_HZ)
    common = allocate_common(*instance, TOTAL_HZ)
    assert instance.seconds(alone)[0] == pytest.approx(instance.seconds(common)[0], rel=1e-6)


def test_no_random_allocation_is_better() -> None:
    rng = np.random.default_rng(1)
    instance = random_instance(300)
    best_s = instance.seconds(allocate_common(*instance, TOTAL_HZ)).sum()
    for share in rng.dirichlet(np.ones(instance.rows.shape[1]), 2000):
        assert instance.seconds(share * TOTAL_HZ).sum() >= best_s * (1 - 1e-6)


def test_many_problems_at_once_are_solved_like_each_alone() -> None:
    rng = np.random.default_rng(2)
    down_hz, up_hz = 10 ** rng.uniform(7, 12, (2, 16, 5))
    rows: Float = rng.integers(0, 20, (16, 12, 5)).astype(np.float64)
    rows[..., 0] += 1
    links = ShannonLinks(9216, down_hz, up_hz)
    common = allocate_common(links, rows, rows * 1e-5, TOTAL_HZ)
    each = allocate_layer(links.each_layer(), rows, rows * 1e-5, TOTAL_HZ)
    for i in range(len(rows)):
        one = ShannonLinks(9216, down_hz[i], up_hz[i])
        instance = Instance(one, rows[i], rows[i] * 1e-5)
        assert instance.seconds(common[i]) == pytest.approx(instance.seconds(allocate_common(*instance, TOTAL_HZ)))
        alone = allocate_layer(one.each_layer(), instance.rows, instance.fixed_s, TOTAL_HZ)
        assert instance.seconds(each[i]) == pytest.approx(instance.seconds(alone))


def test_equal_nodes_get_equal_shares() -> None:
    same = np.full(4, 1e9)
    rows = np.array([[3.0, 3.0, 3.0, 0.0]])
    links = ShannonLinks(9216, same, same)
    expected = np.array([1, 1, 1, 0]) * TOTAL_HZ / 3
    assert allocate_layer(links.each_layer(), rows, np.zeros_like(rows), TOTAL_HZ)[0] == pytest.approx(expected)
    assert allocate_common(links, rows, np.zeros_like(rows), TOTAL_HZ) == pytest.approx(expected, rel=1e-6)


def test_shares_of_time_have_a_closed_form() -> None:
    # All finish together: rows·row_s / share is the same for all.
    row_s, rows = np.array([1.0, 2.0, 4.0]), np.array([[4.0, 1.0, 1.0]])
    share = allocate_layer(ShareLinks(row_s).each_layer(), rows, np.zeros_like(rows), 1.0)
    assert share[0] == pytest.approx([0.4, 0.2, 0.4])


def test_derivatives_of_the_row_time() -> None:
    links = ShannonLinks(9216, np.array([1e4, 1e8, 1e12]), np.array([1e3, 1e7, 1e10]))
    hz, step = np.full(3, 1e7), 1e2
    below, at, above = (links.row_time(hz + d) for d in (-step, 0, step))
    assert at.slope == pytest.approx((above.seconds - below.seconds) / (2 * step), rel=1e-6)
    assert at.curvature == pytest.approx((above.slope - below.slope) / (2 * step), rel=1e-6)
