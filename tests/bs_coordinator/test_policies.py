"""Each policy against a slow reference that says the same in plain loops, and what its options do at their ends."""

import math
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bs_coordinator.forecast import LayerForecast
from bs_coordinator.selection import TopK, parse_policy
from bs_coordinator.selection.bottleneck import Bottleneck
from bs_coordinator.selection.capacity import Capacity, fill_s
from bs_coordinator.selection.demand import demand, node_map, place, predicted_s
from bs_coordinator.selection.differences import DifferenceTable
from bs_coordinator.selection.similar import Similar
from bs_coordinator.selection.subset import Subset
from bs_coordinator.selection.wdmoe import Wdmoe
from wire.tensors import Array

EXPERTS = 6


@st.composite
def exact_layers(draw: st.DrawFn, max_tokens: int = 40) -> tuple[Array, LayerForecast]:
    """Gates and costs in small binary fractions, so that sums are exact in any order and ties are ties."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tokens = draw(st.integers(1, max_tokens))
    nodes = draw(st.integers(1, EXPERTS))
    fine = draw(st.sampled_from([4, 64, 1000]))
    probabilities = (rng.integers(1, fine + 1, (tokens, EXPERTS)) / 4096).astype(np.float32)
    a, b, c, d = rng.integers(1, fine + 1, (4, nodes)) / 65536
    holder = rng.integers(0, nodes, EXPERTS)
    return probabilities, LayerForecast(0, holder, a, b, c, d, shared_air=draw(st.booleans()))


def _top(row: Array, k: int) -> list[int]:
    return np.flatnonzero(TopK(k).select(row[None], LayerForecast.even(0, len(row)))[0]).tolist()


@given(exact_layers(), st.integers(1, 4), st.sampled_from([0.0, 0.5, 1.0, 1.02, 1.2, 9.0]), st.booleans())
def test_wdmoe_is_the_rule_token_by_token(
    layer: tuple[Array, LayerForecast], k: int, gain: float, renormalise: bool
) -> None:
    probabilities, forecast = layer
    policy = Wdmoe(k, start=0.55, step=0.07, stop=0.98, gain=gain, renormalise=renormalise)
    times = forecast.one_row_s
    top = TopK(k).select(probabilities, forecast)

    def ratio(asked: list[dict[int, float]]) -> float:
        pairs = [w / times[e] for token in asked for e, w in token.items()]
        return float(sum(pairs) / len(pairs))

    before = [{e: float(row[e]) for e in np.flatnonzero(row).tolist()} for row in top]
    steps = 0
    while True:
        theta = 0.55 + 0.07 * steps
        after = []
        for row, token in zip(probabilities, before, strict=True):
            p = row.astype(np.float64)
            likeness = (p @ times) / math.sqrt((p @ p) * (times @ times))
            kept = dict(token)
            if likeness <= theta and len(token) > 1:
                del kept[min(kept, key=lambda e: (kept[e], e))]
            after.append(kept)
        steps += 1
        if ratio(after) / ratio(before) > gain or 0.55 + 0.07 * steps > 0.98 + 1e-9:
            break
    expected = np.zeros_like(top)
    for t, token in enumerate(after):
        for e, w in token.items():
            expected[t, e] = w / (sum(token.values()) if renormalise else 1)
    np.testing.assert_allclose(policy.select(probabilities, forecast), expected, rtol=1e-5)


def _reference_plans(
    allowed: list[list[tuple[frozenset[int], float]]], forecast: LayerForecast
) -> list[frozenset[int]]:
    """The list scheduling of `choose_plans`, a token and a plan at a time.

    Args:
        allowed: per token, the plans that it may choose, each with how much it is liked.
    """
    f = forecast
    rows = dict.fromkeys(range(len(f.fixed_s)), 0)
    asked: set[int] = set()

    def wait(plan: frozenset[int], extra: int) -> float:
        latest = 0.0
        for node in {int(f.holder[e]) for e in plan}:
            experts = sum(1 for e in asked | plan if f.holder[e] == node)
            row = f.row_compute_s[node] + (0.0 if f.shared_air else f.row_air_s[node])
            latest = max(latest, f.fixed_s[node] + experts * f.expert_s[node] + (rows[node] + extra) * row)
        return latest

    def air(plan: frozenset[int]) -> float:
        return sum(f.row_air_s[n] for n in {int(f.holder[e]) for e in plan}) if f.shared_air else 0.0

    floor = max(min(wait(plan, 1) for plan, _ in plans) for plans in allowed)
    block = math.ceil(len(allowed) / 16)
    result: list[frozenset[int]] = []
    for start in range(0, len(allowed), block):
        now = []
        for plans in allowed[start : start + block]:
            costs = [max(wait(plan, 1), floor) + air(plan) for plan, _ in plans]
            best = [p for p, cost in zip(plans, costs, strict=True) if cost == min(costs)]
            now.append(max(best, key=lambda p: p[1])[0])
        for plan in now:
            asked |= plan
            for node in {int(f.holder[e]) for e in plan}:
                rows[node] += 1
        floor = max([floor, *(wait(frozenset([e]), 0) for e in asked)])
        result += now
    return result


def _mask(sets: list[frozenset[int]]) -> NDArray[np.bool_]:
    mask = np.zeros((len(sets), EXPERTS), np.bool_)
    for t, plan in enumerate(sets):
        mask[t, sorted(plan)] = True
    return mask


@settings(deadline=None)
@given(exact_layers(), st.integers(1, 3), st.sampled_from([0.0, 0.4, 0.75, 1.0]))
def test_subset_is_the_enumeration_token_by_token(layer: tuple[Array, LayerForecast], k: int, share: float) -> None:
    probabilities, forecast = layer
    sets = [frozenset(s) for size in range(1, k + 1) for s in combinations(range(EXPERTS), size)]
    allowed = []
    for row in probabilities:
        mass = {s: sum(float(row[e]) for e in s) for s in sets}
        allowed.append([(s, m) for s, m in mass.items() if m >= np.float32(share) * np.float32(max(mass.values()))])
    chosen = _mask(_reference_plans(allowed, forecast))
    top = TopK(k).select(probabilities, forecast) > 0
    expected = chosen if predicted_s(chosen, forecast) <= predicted_s(top, forecast) else top
    np.testing.assert_array_equal(Subset(k, share).select(probabilities, forecast) > 0, expected)


@settings(deadline=None)
@given(exact_layers(), st.integers(1, 2), st.sampled_from([0.0, 0.2, 0.6]), st.integers(0, 99))
def test_similar_spends_its_budget_on_time(
    layer: tuple[Array, LayerForecast], k: int, budget: float, seed: int
) -> None:
    """Against all ways to replace and skip, where one token's choice is the whole layer."""
    probabilities, forecast = layer
    values = np.random.default_rng(seed).uniform(0.1, 1.2, (1, EXPERTS, EXPERTS)).astype(np.float32)
    policy = Similar(DifferenceTable("", values), k, budget)
    for row in probabilities[:4]:
        top = TopK(k).select(row[None], forecast)[0]
        slots = _top(row, k)
        fastest = math.inf
        for plan in product([*range(EXPERTS), None], repeat=len(slots)):
            error = sum(
                top[a] * (1 if b is None else 0 if a == b else values[0, a, b])
                for a, b in zip(slots, plan, strict=True)
            )
            used = frozenset(b for b in plan if b is not None)
            if used and error <= budget:
                fastest = min(fastest, predicted_s(_mask([used]), forecast))
        weights = policy.select(row[None], forecast)
        assert predicted_s(weights > 0, forecast) == pytest.approx(fastest)


def test_a_replacement_works_with_the_weight_of_what_it_replaces() -> None:
    values = np.full((1, 4, 4), 0.9, np.float32)
    values[0, 1, 2] = 0.1  # expert 2 can stand in for 1
    cost = np.array([1.0, 9.0, 1.0, 9.0])
    slow = LayerForecast(0, np.arange(4), cost, cost, cost, cost)
    p = np.array([[0.5, 0.3, 0.05, 0.15]], np.float32)
    replaced = Similar(DifferenceTable("", values), 2, 0.05).select(p, slow)
    np.testing.assert_allclose(replaced, [[0.625, 0, 0.375, 0]])
    skipped = Similar(DifferenceTable("", np.ones((1, 4, 4), np.float32)), 2, 0.4).select(p, slow)
    # Skipping costs what any replacement would; of plans with equal error the first wins, and it is as fast.
    assert skipped[0, 0] > 0
    assert skipped[0, [1, 3]].sum() == 0
    np.testing.assert_allclose(Similar(DifferenceTable("", values), 2, 0.0).select(p, slow), [[0.625, 0.375, 0, 0]])


generous = st.sampled_from(
    ["wdmoe:start=0,gain=0", "bottleneck:factor=1e9", "bottleneck:limit=0", "capacity:slack=1e9", "subset:share=1"]
)


@given(exact_layers(), generous, st.integers(1, 3))
def test_generous_options_are_top_k(layer: tuple[Array, LayerForecast], text: str, k: int) -> None:
    probabilities, forecast = layer
    weights = parse_policy(text, top_k=k).select(probabilities, forecast)
    top = TopK(k).select(probabilities, forecast)
    if text.startswith("subset"):
        # Where several experts tie for the last place, subset may take the faster.
        np.testing.assert_allclose(
            np.where(weights > 0, probabilities, 0).sum(axis=1), np.where(top > 0, probabilities, 0).sum(axis=1)
        )
    else:
        np.testing.assert_allclose(weights, top, rtol=1e-6)


@given(exact_layers(max_tokens=1), st.integers(1, 3))
def test_less_share_is_never_slower_for_one_token(layer: tuple[Array, LayerForecast], k: int) -> None:
    probabilities, forecast = layer
    times = [
        predicted_s(Subset(k, share).select(probabilities, forecast) > 0, forecast)
        for share in (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
    ]
    assert times == sorted(times, reverse=True)


def test_wdmoe_at_its_ends_is_top_1() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(8), 50).astype(np.float32)
    forecast = LayerForecast.even(0, 8)
    weights = Wdmoe(2, start=1, stop=1).select(probabilities, forecast)
    # Rounding may put a cosine just above 1 only for a flat gate.
    np.testing.assert_array_equal(weights, TopK(1).select(probabilities, forecast))


SLOW = LayerForecast(
    layer=0,
    holder=np.arange(8),
    fixed_s=np.array([10.0, 2, 2, 2, 2, 2, 2, 3]) / 1e3,
    expert_s=np.full(8, 0.2e-3),
    row_air_s=np.array([1.0, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.4]) / 1e3,
    row_compute_s=np.full(8, 0.1e-3),
)
"""Node 0 is five times as slow as the others."""


@pytest.mark.parametrize("policy", [Bottleneck(2, move=False), Capacity(2, move=False), Bottleneck(2), Capacity(2)])
def test_one_token_leaves_a_slow_second_expert(policy: Bottleneck | Capacity) -> None:
    p = np.array([[0.3, 0.4, 0.05, 0.05, 0.05, 0.1, 0.03, 0.02]], np.float32)
    weights = policy.select(p, SLOW)
    # Without `move` it is dropped, else the next-best expert takes its place.
    expected = [1, 5] if policy.move else [1]
    assert np.flatnonzero(weights).tolist() == expected
    np.testing.assert_allclose(weights[0, expected], p[0, expected] / p[0, expected].sum(), rtol=1e-6)


@pytest.mark.parametrize("policy", [Bottleneck(2, move=False), Capacity(2, move=False)])
def test_the_weakest_go_first_and_nobody_is_left_alone(policy: Bottleneck | Capacity) -> None:
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.full(8, 0.4), 200).astype(np.float32)
    p[:, 0] += 0.15  # a favourite on the slow node
    p /= p.sum(axis=1, keepdims=True)
    top = TopK(2).select(p, SLOW)
    weights = policy.select(p, SLOW)
    gone = (top > 0) & (weights == 0)
    stayed = (top[:, 0] > 0) & (weights[:, 0] > 0) & (top[:, 0] < 0.5)
    assert gone[:, 0].any()
    assert top[gone].max() <= 0.5
    assert not stayed.any() or top[gone[:, 0], 0].max() <= top[stayed, 0].min() + 1e-6
    assert (weights > 0).any(axis=1).all()
    assert predicted_s(weights > 0, SLOW) < 0.9 * predicted_s(top > 0, SLOW)


def test_moving_fills_other_nodes_no_further_than_allowed() -> None:
    rng = np.random.default_rng(2)
    p = rng.dirichlet(np.full(8, 0.4), 200).astype(np.float32)
    p[:, 0] += 0.15
    p /= p.sum(axis=1, keepdims=True)
    top_s = predicted_s(TopK(2).select(p, SLOW) > 0, SLOW)
    for moving, dropping in ((Capacity(2), Capacity(2, move=False)), (Bottleneck(2), Bottleneck(2, move=False))):
        moved, dropped = (policy.select(p, SLOW) > 0 for policy in (moving, dropping))
        assert moved.sum() > dropped.sum()
        assert predicted_s(moved, SLOW) < top_s


@given(st.integers(0, 2**32 - 1), st.integers(1, 200))
def test_fill_is_when_all_rows_fit(seed: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    ready_s, row_s = rng.uniform(0.001, 1, 5), rng.uniform(0.001, 0.1, 5)
    deadline_s = fill_s(ready_s, row_s, rows)
    assert np.maximum(0, (deadline_s - ready_s) / row_s).sum() == pytest.approx(rows)


@given(st.integers(0, 2**32 - 1), st.integers(0, 30))
def test_placing_is_first_come_first_served(seed: int, applicants: int) -> None:
    rng = np.random.default_rng(seed)
    preference = (rng.integers(0, 5, (applicants, EXPERTS)) / 8).astype(np.float32)
    holder = rng.integers(0, 3, EXPERTS)
    room = rng.integers(-1, 8, 3)
    placed, left = place(preference, holder, room)
    assert (left >= 0).all()
    used = np.bincount(holder[placed[placed >= 0]], minlength=3)
    np.testing.assert_array_equal(used + left, np.maximum(room, 0))
    for row, expert in zip(preference, placed, strict=True):
        assert expert < 0 or row[expert] > 0
        # Nobody is turned away while a node that it would take has room.
        assert expert >= 0 or not (row * (left > 0)[holder] > 0).any()


def test_demand_counts_a_token_once_per_node() -> None:
    cost = np.ones(3)
    forecast = LayerForecast(0, np.array([0, 0, 1, 2]), cost, cost, cost, cost)
    chosen = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 0]], np.bool_)
    rows, experts = demand(chosen, node_map(forecast))
    assert rows.tolist() == [2, 2, 0]
    assert experts.tolist() == [2, 1, 0]
