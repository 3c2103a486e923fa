"""Each policy against a slow reference in plain loops, and its options at their extremes."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linprog

from bs_coordinator.selection import Policy, TopK, parse_policy
from bs_coordinator.selection.bottleneck import Bottleneck
from bs_coordinator.selection.capacity import Capacity, fill_s
from bs_coordinator.selection.demand import assign_by_preference, demand, predicted_s
from bs_coordinator.selection.differences import DifferenceTable
from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.selection.plans import subsets
from bs_coordinator.selection.routing import Routing, softmax_routing
from bs_coordinator.selection.similar import Similar
from bs_coordinator.selection.subset import Subset
from bs_coordinator.selection.survivors import Survivors
from bs_coordinator.selection.wdmoe import Wdmoe
from testbed.evaluation.scoring import EachAlone
from wire.tensors import Array

EXPERTS = 6
survivors_rules: st.SearchStrategy[Survivors] = st.sampled_from(("total", "none", "mass"))
SLOW = LayerForecast(
    layer=0,
    holder=np.arange(8),
    fixed_s=np.array([10.0, 2, 2, 2, 2, 2, 2, 3]) / 1e3,
    expert_s=np.full(8, 0.2e-3),
    row_air_s=np.array([1.0, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.4]) / 1e3,
    row_compute_s=np.full(8, 0.1e-3),
)
"""Node 0 is five times as slow as the others."""


def routed(probabilities: Array) -> Routing:
    """The routing of a top-2 model."""
    return softmax_routing(probabilities, 2)


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
    return np.flatnonzero(TopK(k).select(routed(row[None]), LayerForecast.even(0, len(row)))[0]).tolist()


@given(exact_layers(), st.integers(1, 4), st.sampled_from([0.0, 0.5, 1.0, 1.02, 1.2, 9.0]), survivors_rules)
def test_wdmoe_is_the_rule_token_by_token(
    layer: tuple[Array, LayerForecast], k: int, gain: float, survivors: Survivors
) -> None:
    probabilities, forecast = layer
    policy = Wdmoe(k, start=0.55, step=0.07, stop=0.98, gain=gain, survivors=survivors)
    times = forecast.one_row_s
    top = TopK(k).select(softmax_routing(probabilities, k), forecast)

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
            expected[t, e] = w / (sum(token.values()) if survivors != "none" else 1)
    np.testing.assert_allclose(policy.select(softmax_routing(probabilities, k), forecast), expected, rtol=1e-5)


def _mask(sets: list[frozenset[int]]) -> NDArray[np.bool_]:
    mask = np.zeros((len(sets), EXPERTS), np.bool_)
    for t, plan in enumerate(sets):
        mask[t, sorted(plan)] = True
    return mask


@given(exact_layers(), st.integers(1, 3), st.sampled_from([1e-6, 0.5, 3.0]), st.sampled_from([0.0, 0.4, 0.75, 1.0]))
def test_subset_of_one_token_is_the_best_of_all_sets(
    layer: tuple[Array, LayerForecast], k: int, price: float, share: float
) -> None:
    probabilities, forecast = layer
    sets = [frozenset(s) for size in range(1, k + 1) for s in combinations(range(EXPERTS), size)]
    policy = Subset(k, price, share)
    for row in probabilities[:4]:
        mass = {s: sum(float(row[e]) for e in s) for s in sets}
        most = max(mass.values())
        # Where several experts tie for the last place, the faster may count as top-k.
        top_s = [predicted_s(_mask([s]), forecast) for s in sets if mass[s] == most]

        def cost(s: frozenset[int], top_s: float, mass: dict[frozenset[int], float] = mass) -> float:
            return predicted_s(_mask([s]), forecast) / top_s + price * (1 - mass[s] / max(mass.values()))

        chosen = frozenset(np.flatnonzero(policy.select(routed(row[None]), forecast)[0]).tolist())
        assert mass[chosen] >= (share - 1e-6) * most
        allowed = [s for s in sets if mass[s] >= (share + 1e-6) * most or mass[s] == most]
        assert any(cost(chosen, t) <= min(cost(s, t) for s in allowed) + 1e-5 for t in top_s)


@settings(deadline=None)
@given(
    exact_layers(),
    st.integers(1, 2),
    st.sampled_from([1e-6, 1.0, 5.0]),
    st.sampled_from([0.0, 0.2, 0.6]),
    st.integers(0, 99),
)
def test_similar_of_one_token_is_the_best_of_all_ways(
    layer: tuple[Array, LayerForecast], k: int, price: float, budget: float, seed: int
) -> None:
    probabilities, forecast = layer
    values = np.random.default_rng(seed).uniform(0.1, 1.2, (1, EXPERTS, EXPERTS)).astype(np.float32)
    policy = Similar(DifferenceTable("", values), k, price, budget)
    for row in probabilities[:4]:
        top = TopK(k).select(routed(row[None]), forecast)[0]
        top_s = predicted_s(top[None] > 0, forecast)
        slots = _top(row, k)
        costs: dict[frozenset[int], float] = {}
        for plan in product([*range(EXPERTS), None], repeat=len(slots)):
            error = sum(
                top[a] * (1 if b is None else 0 if a == b else values[0, a, b])
                for a, b in zip(slots, plan, strict=True)
            )
            used = frozenset(b for b in plan if b is not None)
            if used and error <= budget + 1e-6:
                cost = predicted_s(_mask([used]), forecast) / top_s + price * float(error)
                costs[used] = min(cost, costs.get(used, math.inf))
        used = frozenset(np.flatnonzero(policy.select(routed(row[None]), forecast)[0]).tolist())
        assert costs[used] <= min(costs.values()) + 1e-5


def _objective(weights: Array, probabilities: Array, forecast: LayerForecast, price: float, k: int = 2) -> float:
    """What `subset` makes small."""
    top = TopK(k).select(routed(probabilities), forecast) > 0
    mass, most = (np.where(asked, probabilities, 0).sum(axis=1) for asked in (weights > 0, top))
    return predicted_s(weights > 0, forecast) / predicted_s(top, forecast) + price * float(1 - (mass / most).mean())


@settings(deadline=None)
@given(exact_layers(), st.integers(1, 3), st.sampled_from([0.1, 2.0]), st.sampled_from([0.0, 0.5, 0.9]))
def test_subset_of_many_tokens_keeps_its_limits(
    layer: tuple[Array, LayerForecast], k: int, price: float, share: float
) -> None:
    probabilities, forecast = layer
    weights = Subset(k, price, share).select(routed(probabilities), forecast)
    top = TopK(k).select(routed(probabilities), forecast)
    mass, most = (np.where(asked > 0, probabilities, 0).sum(axis=1) for asked in (weights, top))
    assert (mass >= (share - 1e-6) * most).all()
    assert ((weights > 0).sum(axis=1) <= k).all()
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
    # Top-k itself is always a choice; of tied experts it may ask others.
    if all(len(set(row.tolist())) == EXPERTS for row in probabilities):
        assert _objective(weights, probabilities, forecast, price, k) <= 1 + 1e-5


def test_every_set_is_found_among_many_experts() -> None:
    plans = subsets(64, 2)
    order = np.random.default_rng(11).permutation(len(plans.members))
    np.testing.assert_array_equal(plans.index_of(plans.members[order] > 0), order)


@pytest.mark.parametrize("shared_air", [False, True])
@pytest.mark.parametrize("price", [0.5, 2.0, 5.0])
def test_subset_of_many_tokens_is_near_the_linear_program(shared_air: bool, price: float) -> None:
    """SciPy's optimum over fractions of plans, which no choice of whole plans can beat."""
    rng = np.random.default_rng(7)
    tokens, experts = 200, 8
    p = rng.dirichlet(np.full(experts, 0.5), tokens).astype(np.float32)
    zero, row = np.zeros(experts), 1e-3 / np.array([5.0, 5, 5, 2.5, 2.5, 2.5, 1, 1])
    forecast = LayerForecast(0, np.arange(experts), zero, zero, row, np.full(experts, 1e-4), shared_air)
    sets = [s for size in (1, 2) for s in combinations(range(experts), size)]
    members = np.array([[e in s for e in range(experts)] for s in sets], np.float64)
    top = TopK(2).select(routed(p), forecast)
    top_s = predicted_s(top > 0, forecast)
    loss = 1 - (p @ members.T) / np.where(top > 0, p, 0).sum(axis=1, keepdims=True)
    # Variables: the share of each plan of each token, and the time of the slowest node.
    air_s = row if shared_air else zero
    each = price * loss / tokens + (members @ air_s) / top_s
    busy = members * (forecast.row_air_s - air_s + forecast.row_compute_s)
    rows_of_nodes = np.concatenate([np.tile(busy.T, tokens), -np.ones((experts, 1))], axis=1)
    one_each = np.concatenate([np.kron(np.eye(tokens), np.ones(len(sets))), np.zeros((tokens, 1))], axis=1)
    cost = np.append(each.ravel(), 1 / top_s)
    optimum = linprog(cost, A_ub=rows_of_nodes, b_ub=zero, A_eq=one_each, b_eq=np.ones(tokens)).fun
    ours = _objective(Subset(2, price, 0.0).select(routed(p), forecast), p, forecast, price)
    assert optimum - 1e-6 <= ours <= 1.03 * optimum


@pytest.mark.parametrize("shared_air", [False, True])
@pytest.mark.parametrize("holder", [[0, 1, 2, 3], [0, 0, 1, 1]])
def test_subset_of_few_tokens_is_near_the_best_of_all_combinations(holder: list[int], shared_air: bool) -> None:
    rng = np.random.default_rng(8)
    experts, price = 4, 2.0
    sets = [s for size in (1, 2) for s in combinations(range(experts), size)]
    excess = []
    for _ in range(12):
        p = rng.dirichlet(np.full(experts, 0.5), 3).astype(np.float32)
        fixed, expert, row, compute = rng.uniform(0.1, 1, (4, max(holder) + 1))
        forecast = LayerForecast(0, np.array(holder), 4 * fixed, expert, row, compute, shared_air)
        top = TopK(2).select(routed(p), forecast) > 0
        top_s, most = predicted_s(top, forecast), np.where(top, p, 0).sum(axis=1)
        best = math.inf
        for plans in product(sets, repeat=len(p)):
            mass = [sum(float(token[e]) for e in plan) for token, plan in zip(p, plans, strict=True)]
            chosen = np.array([[e in plan for e in range(experts)] for plan in plans])
            best = min(best, predicted_s(chosen, forecast) / top_s + price * float(1 - (mass / most).mean()))
        excess.append(_objective(Subset(2, price, 0.0).select(routed(p), forecast), p, forecast, price) / best - 1)
    assert min(excess) >= -1e-6
    assert np.mean(excess) < 0.05


def test_similar_of_many_tokens_leaves_a_crowded_node() -> None:
    rng = np.random.default_rng(9)
    p = rng.dirichlet(np.full(8, 0.5), 100).astype(np.float32)
    values = np.full((1, 8, 8), 0.3, np.float32)
    weights = Similar(DifferenceTable("", values), 2, price=2.5).select(routed(p), SLOW)
    assert predicted_s(weights > 0, SLOW) < 0.7 * predicted_s(TopK(2).select(routed(p), SLOW) > 0, SLOW)


@pytest.mark.parametrize("kind", ["topk", "wdmoe", "bottleneck", "capacity", "subset", "similar"])
@settings(max_examples=15)
@given(exact_layers(max_tokens=12), st.integers(1, 3), st.booleans(), survivors_rules, st.booleans(), st.booleans())
def test_many_tokens_alone_are_what_each_is_alone(
    kind: str, layer: tuple[Array, LayerForecast], k: int, lost: bool, survivors: Survivors, own: bool, many: bool
) -> None:
    probabilities, forecast = layer
    routing = routed(probabilities)
    if lost:
        forecast = replace(forecast, available=np.array([False, *[True] * (EXPERTS - 1)]))
    values = np.random.default_rng(k).integers(0, 5, (1, EXPERTS, EXPERTS)) / 4
    table = DifferenceTable("", values.astype(np.float32))
    kinds: dict[str, Callable[..., Policy]] = {
        "topk": TopK, "wdmoe": Wdmoe, "bottleneck": Bottleneck, "capacity": Capacity, "subset": Subset,
        "similar": partial(Similar, table),
    }  # fmt: skip
    policy = kinds[kind](2 if own else k, survivors=survivors)
    with pytest.MonkeyPatch.context() as patch:
        if many:  # as with more experts than all sets can be compared of
            patch.setattr("bs_coordinator.selection.subset.MAX_PLANS", 5)
            patch.setattr("bs_coordinator.selection.similar.MAX_PLANS", 5)
        alone = EachAlone(policy).select(routing, forecast)
        one = [policy.select(routing.rows(slice(i, i + 1)), forecast)[0] for i in range(len(probabilities))]
    np.testing.assert_array_equal(alone, one)


def test_each_alone_chooses_as_if_there_were_no_others() -> None:
    p = np.random.default_rng(10).dirichlet(np.full(8, 0.5), 60).astype(np.float32)
    policy = Subset(2)
    alone = EachAlone(policy).select(routed(p), SLOW)
    np.testing.assert_array_equal(alone, [policy.select(routed(row[None]), SLOW)[0] for row in p])
    assert (alone != policy.select(routed(p), SLOW)).any()


def test_a_replacement_works_with_the_weight_of_what_it_replaces() -> None:
    values = np.full((1, 4, 4), 0.9, np.float32)
    values[0, 1, 2] = 0.1  # expert 2 can stand in for 1
    cost = np.array([1.0, 9.0, 1.0, 9.0])
    slow = LayerForecast(0, np.arange(4), cost, cost, cost, cost)
    p = np.array([[0.5, 0.3, 0.05, 0.15]], np.float32)
    replaced = Similar(DifferenceTable("", values), 2, budget=0.05).select(routed(p), slow)
    np.testing.assert_allclose(replaced, [[0.625, 0, 0.375, 0]])
    skipped = Similar(DifferenceTable("", np.ones((1, 4, 4), np.float32)), 2, 0.1, 0.4).select(routed(p), slow)
    # Skipping costs what any replacement would; of plans with equal error the first wins, and it is as fast.
    assert skipped[0, 0] > 0
    assert skipped[0, [1, 3]].sum() == 0
    np.testing.assert_allclose(
        Similar(DifferenceTable("", values), 2, budget=0.0).select(routed(p), slow), [[0.625, 0.375, 0, 0]]
    )


generous = st.sampled_from(
    ["wdmoe:start=0,gain=0", "bottleneck:factor=1e9", "bottleneck:limit=0", "capacity:slack=1e9", "subset:share=1"]
)


@given(exact_layers(), generous, st.integers(1, 3))
def test_generous_options_are_top_k(layer: tuple[Array, LayerForecast], text: str, k: int) -> None:
    probabilities, forecast = layer
    weights = parse_policy(text, top_k=k).select(routed(probabilities), forecast)
    top = TopK(k).select(routed(probabilities), forecast)
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
        predicted_s(Subset(k, 1e-6, share).select(routed(probabilities), forecast) > 0, forecast)
        for share in (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
    ]
    assert times == sorted(times, reverse=True)


def test_wdmoe_at_its_ends_is_top_1() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(8), 50).astype(np.float32)
    forecast = LayerForecast.even(0, 8)
    weights = Wdmoe(2, start=1, stop=1).select(routed(probabilities), forecast)
    # Rounding may put a cosine just above 1 only for a flat gate.
    np.testing.assert_array_equal(weights, TopK(1).select(routed(probabilities), forecast))


@pytest.mark.parametrize("policy", [Bottleneck(2, move=False), Capacity(2, move=False), Bottleneck(2), Capacity(2)])
def test_one_token_leaves_a_slow_second_expert(policy: Bottleneck | Capacity) -> None:
    p = np.array([[0.3, 0.4, 0.05, 0.05, 0.05, 0.1, 0.03, 0.02]], np.float32)
    weights = policy.select(routed(p), SLOW)
    # Without `move` it is dropped, else the next-best expert takes its place.
    expected = [1, 5] if policy.move else [1]
    assert np.flatnonzero(weights).tolist() == expected
    np.testing.assert_allclose(weights[0, expected], p[0, expected] / p[0, expected].sum(), rtol=1e-6)


@pytest.mark.parametrize("policy", [Bottleneck(2, move=False), Capacity(2, move=False)])
def test_the_weakest_go_first_and_no_token_is_left_without_an_expert(policy: Bottleneck | Capacity) -> None:
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.full(8, 0.4), 200).astype(np.float32)
    p[:, 0] += 0.15  # a favourite on the slow node
    p /= p.sum(axis=1, keepdims=True)
    top = TopK(2).select(routed(p), SLOW)
    weights = policy.select(routed(p), SLOW)
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
    top_s = predicted_s(TopK(2).select(routed(p), SLOW) > 0, SLOW)
    for moving, dropping in ((Capacity(2), Capacity(2, move=False)), (Bottleneck(2), Bottleneck(2, move=False))):
        moved, dropped = (policy.select(routed(p), SLOW) > 0 for policy in (moving, dropping))
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
    placed, left = assign_by_preference(preference, holder, room)
    assert (left >= 0).all()
    used = np.bincount(holder[placed[placed >= 0]], minlength=3)
    np.testing.assert_array_equal(used + left, np.maximum(room, 0))
    for row, expert in zip(preference, placed, strict=True):
        assert expert < 0 or row[expert] > 0
        # No applicant is turned away while a node of an expert that it would take has room.
        assert expert >= 0 or not (row * (left > 0)[holder] > 0).any()


def test_demand_counts_a_token_once_per_node() -> None:
    cost = np.ones(3)
    forecast = LayerForecast(0, np.array([0, 0, 1, 2]), cost, cost, cost, cost)
    chosen = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 0]], np.bool_)
    rows, experts = demand(chosen, forecast.node_map())
    assert rows.tolist() == [2, 2, 0]
    assert experts.tolist() == [2, 1, 0]


@settings(max_examples=150)
@given(
    exact_layers(max_tokens=1),
    st.integers(1, 3),
    st.sampled_from([0.25, 0.5, 0.75]),
    st.booleans(),
    st.sampled_from([1.0, 1.1, 2.0]),
)
def test_one_token_alone_is_treated_as_in_company(
    layer: tuple[Array, LayerForecast], k: int, limit: float, move: bool, factor: float
) -> None:
    """These policies have a fast path for one token, which must choose what the path for many tokens chooses."""
    probabilities, forecast = layer
    wdmoe = Wdmoe(k, start=limit, stop=0.95, gain=factor - 0.5, survivors="total" if move else "mass")
    for policy in (Bottleneck(k, factor, limit, move), Capacity(k, factor, limit, move), wdmoe):
        alone, many = (
            policy.select_single(routed(probabilities), forecast),
            policy.select_batch(routed(probabilities), forecast),
        )
        np.testing.assert_array_equal(alone > 0, many > 0)
        np.testing.assert_allclose(alone, many, rtol=1e-6)
