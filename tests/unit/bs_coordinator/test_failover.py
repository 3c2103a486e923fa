"""The pure decisions behind failover: who is asked, who is left out, what is chosen instead of what is lost."""

from collections import Counter
from dataclasses import replace
from itertools import combinations_with_replacement

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_coordinator.dispatch.assignment import HYSTERESIS, RequestCost, assign
from bs_coordinator.dispatch.health import FIRST_PAUSE_S, MOST_PAUSE_S, PING_TIMEOUT_S, QUARANTINE_S, Health
from bs_coordinator.dispatch.join_watch import WINDOW, JoinWatch
from bs_coordinator.errors import ExpertsLostError
from bs_coordinator.selection import parse_policy
from bs_coordinator.selection.degraded import select_available
from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.selection.routing import softmax_routing
from wire.tensors import Array

NODES = ["a", "b", "c", "d"]
holders_lists = st.lists(st.lists(st.sampled_from(NODES), unique=True, max_size=4), min_size=1, max_size=8)
seconds = st.floats(1e-3, 1.0)
costs = st.fixed_dictionaries({n: st.builds(RequestCost, seconds, seconds) for n in NODES})


@given(holders_lists, costs)
def test_experts_are_assigned_to_their_holders(holders: list[list[str]], cost: dict[str, RequestCost]) -> None:
    for nodes, chosen in zip(holders, assign(holders, cost), strict=True):
        assert chosen in nodes if nodes else chosen is None


@given(holders_lists, costs)
def test_an_assignment_stays_while_nothing_changes(holders: list[list[str]], cost: dict[str, RequestCost]) -> None:
    first = assign(holders, cost)
    again = assign(holders, cost, first)
    assert assign(holders, cost, again) == again


def test_replicas_share_the_work() -> None:
    ring = [[NODES[e % 4], NODES[(e + 1) % 4]] for e in range(8)]
    assert set(Counter(assign(ring, dict.fromkeys(NODES, RequestCost(0.005, 0.01)))).values()) == {2}


def test_a_slow_holder_gets_less() -> None:
    everywhere = [["a", "b"]] * 6
    assert Counter(assign(everywhere, {"a": RequestCost(0.0, 0.02), "b": RequestCost(0.0, 0.01)})) == {"a": 2, "b": 4}


@given(st.integers(1, 6), costs)
def test_a_step_that_asks_every_expert_is_over_as_soon_as_it_can_be(experts: int, cost: dict[str, RequestCost]) -> None:
    def over_s(counts: Counter[str | None]) -> float:
        return max(cost[node].seconds(n) for node, n in counts.items() if node is not None)

    all_ways = combinations_with_replacement(NODES, experts)
    assert over_s(Counter(assign([NODES] * experts, cost))) == min(over_s(Counter(way)) for way in all_ways)


def test_a_round_trip_counts_once_however_many_experts_a_node_is_asked_for() -> None:
    link, here = RequestCost(fixed_s=0.005, expert_s=0.001), RequestCost(fixed_s=0.0, expert_s=0.0007)
    assert assign([["here", "node"]] * 8, {"here": here, "node": link}) == ["here"] * 8


def test_an_expert_moves_only_for_a_clear_gain() -> None:
    little, much = 1 / (1 + 0.9 * HYSTERESIS), 1 / (1 + 1.1 * HYSTERESIS)

    def cost(b_s: float) -> dict[str, RequestCost]:
        return {"a": RequestCost(0.0, 1.0), "b": RequestCost(0.0, b_s)}

    assert assign([["a", "b"]], cost(little), ["a"]) == ["a"]
    assert assign([["a", "b"]], cost(much), ["a"]) == ["b"]


def test_pauses_double_up_to_a_limit_and_end_with_a_proof() -> None:
    health, now_s = Health(), 0.0
    pauses = []
    for _ in range(9):
        health.failed("a", now_s, "why")
        assert not health.usable("a")
        began_s = now_s
        while not health.to_prove(now_s):
            now_s += 0.5
        pauses.append(now_s - began_s)
        health.proven("a", now_s)
        assert health.usable("a")
    for _ in range(2000):
        now_s += MOST_PAUSE_S
        health.failed("a", now_s, "why")
        assert not health.usable("a")
        health.proven("a", now_s + MOST_PAUSE_S)
    assert pauses[:4] == [FIRST_PAUSE_S * 2**i for i in range(4)]
    assert pauses[-1] == MOST_PAUSE_S


def test_a_ping_without_an_answer_is_sent_again() -> None:
    health = Health()
    health.failed("a", 0.0, "why")
    assert health.to_prove(FIRST_PAUSE_S) == ["a"]
    assert health.to_prove(FIRST_PAUSE_S + 0.1) == []
    assert health.to_prove(FIRST_PAUSE_S + PING_TIMEOUT_S) == ["a"]
    assert not health.usable("a")


def test_an_answer_to_a_ping_from_before_a_failure_proves_nothing() -> None:
    health = Health()
    health.failed("a", 5.0, "why")
    health.proven("a", 4.9)
    health.proven("a", 5.9)
    assert not health.usable("a")
    health.proven("a", 6.0)
    assert health.usable("a")


def test_a_doubted_node_is_pinged_at_once_and_its_silence_is_no_failure() -> None:
    health = Health()
    health.doubt("a", 5.0, "silence")
    assert health.doubted("a")
    assert not health.usable("a")
    assert health.to_prove(5.0) == ["a"]
    health.proven("a", 5.0)
    assert health.usable("a")
    health.failed("a", 6.0, "why")
    assert not health.doubted("a")
    assert health.to_prove(6.0 + FIRST_PAUSE_S) == ["a"], "the first failure's pause"
    assert health.counts == {("a", "doubted"): 1, ("a", "failed"): 1}


def test_a_quarantine_outlasts_a_restart_and_an_ordinary_pause() -> None:
    health = Health()
    health.failed("a", 0.0, "late")
    health.failed("a", 0.5, "nonsense", quarantine=True)
    health.restarted("a")
    health.proven("a", QUARANTINE_S)
    assert not health.usable("a")
    health.proven("a", QUARANTINE_S + 0.5)
    assert health.usable("a")
    health.failed("b", 0.0, "late")
    health.restarted("b")
    assert health.usable("b")


def test_an_old_failure_is_forgiven() -> None:
    health = Health()
    for now_s in (0.0, 1000.0, 2000.0):
        health.failed("a", now_s, "why")
        assert health.to_prove(now_s + FIRST_PAUSE_S) == ["a"]
        health.proven("a", now_s + FIRST_PAUSE_S)


gates = st.lists(st.lists(st.floats(0.0, 1.0, width=32), min_size=8, max_size=8), min_size=1, max_size=6)


@given(gates, st.lists(st.booleans(), min_size=8, max_size=8), st.sampled_from(["topk", "top1", "wdmoe", "subset"]))
def test_lost_experts_are_never_chosen_and_other_tokens_keep_their_choice(
    rows: list[list[float]], there: list[bool], name: str
) -> None:
    probabilities: Array = np.array(rows, np.float32) + np.float32(1e-3)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    available = np.array(there)
    policy = parse_policy(name, top_k=2)
    forecast = replace(LayerForecast.even(0, 8), available=available)
    if not available.any():
        with pytest.raises(ExpertsLostError):
            select_available(policy, softmax_routing(probabilities, 2), forecast)
        return
    gate, degraded = select_available(policy, softmax_routing(probabilities, 2), forecast)
    assert not gate[:, ~available].any()
    np.testing.assert_allclose(gate.sum(axis=1), 1, rtol=1e-5)
    wanted = policy.select(softmax_routing(probabilities, 2), replace(forecast, available=None))
    hurt = wanted[:, ~available].any(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(hurt), degraded)
    np.testing.assert_array_equal(gate[~hurt], wanted[~hurt])


def _watch(watch: JoinWatch, nodes: str, ms: float, slowest: str) -> list[str]:
    said = [watch.observe(nodes, int(ms * 1e6), slowest) for _ in range(WINDOW + 1)]
    return [line for line in said if line]


def test_a_node_that_slows_things_down_is_named_once_with_numbers() -> None:
    watch = JoinWatch()
    assert _watch(watch, "ab", 10.0, "a") == []
    (warning,) = _watch(watch, "abc", 15.0, "c")
    assert warning.startswith("since 'c' joined, a layer takes 15.0 ms instead of 10.0; 100%")
    assert _watch(watch, "abc", 20.0, "c") == []


def test_no_warning_for_a_node_that_helps_or_replaces_another() -> None:
    watch = JoinWatch()
    _watch(watch, "ab", 10.0, "a")
    assert _watch(watch, "abc", 9.0, "c") == []
    assert _watch(watch, "abd", 20.0, "d") == []
