"""Every policy with every family's way to route: which experts are asked, and with which weights."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bs_coordinator.selection import Policy, Routing, TopK, parse_policy
from bs_coordinator.selection.bottleneck import Bottleneck
from bs_coordinator.selection.candidates import find_candidates
from bs_coordinator.selection.capacity import Capacity
from bs_coordinator.selection.degraded import select_available
from bs_coordinator.selection.demand import predicted_s
from bs_coordinator.selection.differences import DifferenceTable
from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.selection.registry import check_scores
from bs_coordinator.selection.similar import Similar
from bs_coordinator.selection.subset import Subset
from bs_coordinator.selection.survivors import Survivors, weigh, weigh_one
from bs_coordinator.selection.wdmoe import Wdmoe
from wire.tensors import Array

RULES: tuple[Survivors, ...] = ("total", "none", "mass")
FAMILIES = ("renormalised", "plain", "factor", "biased", "grouped", "unknown")
SHAPES = ((8, 2), (16, 4), (64, 8), (128, 8))


def family_routing(family: str, experts: int, k: int, tokens: int, seed: int) -> Routing:
    """What a router of this kind gives: Mixtral, OLMoE, GLM, DeepSeek without and with groups, Phi."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (tokens, experts))
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    order = None
    if family in ("biased", "grouped"):
        scores = 1 / (1 + np.exp(-logits))
        order = scores + rng.normal(0, 0.5, experts) - 0.5
        if family == "grouped":
            order[:, experts // 2 :] = -np.inf
    best = np.argsort(-(scores if order is None else order), axis=1)[:, :k]
    weights = np.zeros((tokens, experts))
    np.put_along_axis(weights, best, np.take_along_axis(scores, best, axis=1), axis=1)
    if family != "plain":
        weights /= weights.sum(axis=1, keepdims=True)
    if family in ("factor", "biased", "grouped"):
        weights *= 1.8
    if family == "unknown":
        weights[:] = np.where(weights > 0, rng.uniform(0.1, 1, weights.shape), 0)
        return Routing(weights.astype(np.float32), None)
    return Routing(
        weights.astype(np.float32), scores.astype(np.float32), None if order is None else order.astype(np.float32)
    )


def some_forecast(experts: int, seed: int) -> LayerForecast:
    rng = np.random.default_rng(seed)
    nodes = int(rng.integers(1, 6))
    a, b, c, d = rng.uniform(1e-4, 1e-2, (4, nodes))
    return LayerForecast(0, rng.integers(0, nodes, experts), a, b, c, d, shared_air=bool(rng.integers(2)))


def all_policies(experts: int, k: int, rule: Survivors, kept: list[tuple[int, int]]) -> list[Policy]:
    values = np.random.default_rng(1).uniform(0.05, 1.2, (1, experts, experts)).astype(np.float32)
    table = DifferenceTable("", values, kept)
    keep = table if kept else None
    return [
        TopK(k, rule, keep), TopK(1, rule, keep), Wdmoe(k, survivors=rule, keep=keep),
        Bottleneck(k, survivors=rule, keep=keep), Capacity(k, survivors=rule, keep=keep),
        Capacity(k, limit=0.9, move=False, survivors=rule, keep=keep),
        Subset(k, survivors=rule, keep=keep), Similar(table, k, survivors=rule),
    ]  # fmt: skip


def expected_weights(routing: Routing, chosen: NDArray[np.bool_], rule: Survivors) -> Array:
    """The rules, token by token and expert by expert, without anything of the project's."""
    scores = routing.weights if routing.scores is None else routing.scores
    order = scores if routing.order is None else routing.order
    result = np.zeros(chosen.shape)
    for t in range(len(chosen)):
        own = [e for e in range(chosen.shape[1]) if routing.weights[t, e] > 0]
        kept = [e for e in range(chosen.shape[1]) if chosen[t, e]]
        ranked = sorted(range(chosen.shape[1]), key=lambda e: -float(order[t, e]))
        counted = {"total": kept, "none": own, "mass": ranked[: len(kept)]}[rule]
        whole = sum(float(scores[t, e]) for e in counted)
        for e in kept:
            result[t, e] = sum(float(routing.weights[t, x]) for x in own) * float(scores[t, e]) / whole
        if kept == own or rule == "none":
            for e in set(kept) & set(own):
                result[t, e] = routing.weights[t, e]
    return result.astype(np.float32)


cases = st.tuples(
    st.sampled_from(FAMILIES[:-1]), st.sampled_from(SHAPES), st.sampled_from((1, 2, 7)), st.integers(0, 2**32 - 1)
)


@settings(max_examples=60, deadline=None)
@given(cases, st.sampled_from(RULES), st.booleans(), st.booleans())
@example(("grouped", (8, 2), 1, 1854), "total", False, True)  # only experts of other groups are left
@example(("grouped", (8, 2), 7, 1854), "mass", True, True)
def test_every_policy_with_every_router(
    case: tuple[str, tuple[int, int], int, int], rule: Survivors, keeps: bool, losses: bool
) -> None:
    family, (experts, k), tokens, seed = case
    routing = family_routing(family, experts, k, tokens, seed)
    forecast = some_forecast(experts, seed)
    available = np.ones(experts, np.bool_)
    if losses:
        available = np.random.default_rng(seed).random(experts) < 0.5
        available[seed % experts] = True
        forecast = replace(forecast, available=available)
    # The expert that most tokens chose is one that must stay.
    favourite = int((routing.weights > 0).sum(axis=0).argmax())
    for policy in all_policies(experts, k, rule, [(0, favourite)] if keeps else []):
        gate = policy.select(routing, forecast)
        chosen = gate > 0
        assert gate.dtype == np.float32
        assert np.isfinite(gate).all()
        assert (gate >= 0).all()
        assert chosen.any(axis=1).all()
        assert not chosen[:, ~available].any()
        if keeps and available[favourite]:
            assert chosen[routing.weights[:, favourite] > 0, favourite].all()
        if not isinstance(policy, Similar):
            np.testing.assert_allclose(gate, expected_weights(routing, chosen, rule), rtol=2e-6)
        if rule == "total":
            np.testing.assert_allclose(gate.sum(axis=1), routing.weights.sum(axis=1), rtol=1e-5)
        if not isinstance(policy, TopK):
            top = find_candidates(routing, forecast, k).shares > 0
            assert predicted_s(chosen, forecast) <= predicted_s(top, forecast) * (1 + 1e-9)
        alone = np.concatenate([policy.select(routing.rows(slice(0, 1)), forecast)])
        if isinstance(policy, (TopK, Wdmoe)) and tokens == 1:
            np.testing.assert_array_equal(alone, gate)


@given(st.sampled_from(FAMILIES), st.sampled_from(SHAPES), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_topk_is_what_the_model_chooses(family: str, shape: tuple[int, int], tokens: int, seed: int) -> None:
    routing = family_routing(family, *shape, tokens, seed)
    for rule in RULES:
        gate = TopK(shape[1], rule).select(routing, LayerForecast.even(0, shape[0]))
        np.testing.assert_array_equal(gate, routing.weights)


@given(st.sampled_from(FAMILIES), st.sampled_from(SHAPES), st.sampled_from(RULES), st.integers(0, 2**32 - 1))
def test_one_token_weighs_as_many(family: str, shape: tuple[int, int], rule: Survivors, seed: int) -> None:
    routing = family_routing(family, *shape, 1, seed)
    rng = np.random.default_rng(seed)
    own = np.flatnonzero(routing.weights[0])
    chosen = np.zeros((1, shape[0]), np.bool_)
    chosen[0, rng.choice(own, rng.integers(1, len(own) + 1), replace=False)] = True
    if routing.scores is not None:
        chosen[0, rng.integers(shape[0])] = True
    one = weigh_one(routing, np.flatnonzero(chosen[0]).tolist(), rule)
    np.testing.assert_array_equal(one, weigh(routing, chosen, rule))


def test_a_replacement_weighs_by_every_rule_what_it_replaces() -> None:
    values = np.full((1, 4, 4), 0.9, np.float32)
    values[0, 1, 2] = 0.1
    cost = np.array([1.0, 9.0, 1.0, 9.0])
    slow = LayerForecast(0, np.arange(4), cost, cost, cost, cost)
    p = np.array([[0.5, 0.3, 0.05, 0.15]], np.float32)
    routing = Routing(np.array([[0.9, 0.54, 0, 0]], np.float32), p)
    for rule in RULES:
        replaced = Similar(DifferenceTable("", values), 2, budget=0.05, survivors=rule).select(routing, slow)
        np.testing.assert_allclose(replaced, [[0.9, 0, 0.54, 0]], rtol=1e-6)
        kept = Similar(DifferenceTable("", values, [(0, 1)]), 2, budget=0.05, survivors=rule).select(routing, slow)
        np.testing.assert_array_equal(kept, routing.weights)


def test_lost_experts_are_made_up_for_by_the_rule() -> None:
    p = np.array([[0.6, 0.25, 0.1, 0.05]], np.float32)
    routing = Routing(np.array([[0.6, 0.25, 0, 0]], np.float32) / np.float32(0.85), p)
    forecast = replace(LayerForecast.even(0, 4), available=np.array([False, True, True, True]))
    for rule, whole in (("total", 0.35), ("none", 0.85), ("mass", 0.85)):
        gate, degraded = select_available(parse_policy(f"topk:survivors={rule}", top_k=2), routing, forecast)
        assert degraded.tolist() == [0]
        np.testing.assert_allclose(gate, [[0, 0.25 / whole, 0.1 / whole, 0]], rtol=1e-6)
    one = parse_policy("topk:k=1,survivors=mass", top_k=2).select(routing, forecast)
    np.testing.assert_allclose(one, [[0, 0.25 / 0.6, 0, 0]], rtol=1e-6)


def test_without_scores_only_the_models_own_experts_can_be_asked() -> None:
    for text in ("topk", "top1", "topk:k=2,survivors=mass"):
        check_scores(text, parse_policy(text, top_k=2), top_k=2)
    for text in ("wdmoe", "subset", "bottleneck", "capacity", "topk:k=3"):
        with pytest.raises(ValueError, match="how this model scores them is not known: use topk"):
            check_scores(text, parse_policy(text, top_k=2), top_k=2)
    routing = family_routing("unknown", 8, 2, 3, 0)
    gate = TopK(1, "none").select(routing, LayerForecast.even(0, 8))
    np.testing.assert_array_equal(gate, np.where(routing.weights == routing.weights.max(axis=1)[:, None], gate, 0))
    np.testing.assert_allclose(gate.max(axis=1), routing.weights.max(axis=1))
