"""Top-k against transformers' own router, what every policy promises for any input, and policies as text."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from bs_coordinator.selection import POLICY_NAMES, Policy, TopK, parse_policy
from bs_coordinator.selection.bottleneck import Bottleneck
from bs_coordinator.selection.degraded import gate_of_slices
from bs_coordinator.selection.demand import predicted_s
from bs_coordinator.selection.differences import SCHEMA, DifferenceDocument, write_differences
from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.selection.routing import Routing, softmax_routing
from bs_coordinator.selection.similar import Similar
from bs_coordinator.selection.wdmoe import Wdmoe
from wire.tensors import Array

EVEN = LayerForecast.even(0, 8)
logits = hnp.arrays(np.float32, st.tuples(st.integers(1, 20), st.just(8)), elements=st.floats(-20, 20, width=32))
MODEL = "0" * 64
NO_SLOWER = ("topk", "top1", "wdmoe", "bottleneck", "capacity", "subset", "similar")
"""Policies that promise never to raise the predicted time of a layer above that of top-k."""


def routed(probabilities: Array) -> Routing:
    """The routing of a top-2 model."""
    return softmax_routing(probabilities, 2)


@st.composite
def forecasts(draw: st.DrawFn) -> LayerForecast:
    """Any placement of eight experts, in up to three slices, on up to eight nodes, any speeds."""
    nodes, slices = draw(st.integers(1, 8)), draw(st.sampled_from([1, 1, 2, 3]))
    holder = draw(hnp.arrays(np.intp, 8 * slices, elements=st.integers(0, nodes - 1)))
    cost = hnp.arrays(np.float64, nodes, elements=st.floats(1e-6, 0.1))
    units = LayerForecast(0, holder, draw(cost), draw(cost), draw(cost), draw(cost), draw(st.booleans()))
    return units.of_experts(slices)


def test_an_expert_in_slices_takes_as_long_as_the_slowest_of_its_nodes() -> None:
    ones = np.ones(3)
    fixed_s = np.array([1.0, 4.0, 2.0])
    units = LayerForecast(0, np.array([0, 1, 2, 2, 0, 0]), fixed_s, 0.5 * ones, 0.25 * ones, 0.25 * ones)
    forecast = units.of_experts(2)
    assert forecast.holder.tolist() == [1, 2, 0]
    assert forecast.one_row_s.tolist() == [5.0, 3.5, 2.5]  # node 2, like node 0, reads two slices
    assert predicted_s(np.array([[True, False, True]]), forecast) == 5.0
    assert predicted_s(np.array([[False, True, True], [False, False, True]]), forecast) == 3.5
    on_air = replace(forecast, shared_air=True)
    assert predicted_s(np.array([[True, False, False]]), on_air) == 4.75 + 2 * 0.25


def test_an_expert_is_available_with_all_its_slices_and_the_rest_counts_where_none_is() -> None:
    def forecast(*available: int) -> LayerForecast:
        some = np.array(available, np.bool_)
        return replace(LayerForecast.even(0, 6), available=some).of_experts(2)

    partly = forecast(1, 1, 1, 0, 0, 0)
    assert partly.available is not None
    assert (partly.available.tolist(), partly.left) == ([True, False, False], None)
    nowhere = forecast(0, 1, 1, 0, 0, 0)
    assert nowhere.available is not None
    assert nowhere.left is not None
    assert nowhere.available.tolist() == [True, True, False]
    gate = gate_of_slices(np.array([[0.75, 0.25, 0.0]], np.float32), nowhere.left)
    assert gate.tolist() == [[0.0, 0.75, 0.25, 0.0, 0.0, 0.0]]


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Differences of the experts of a one-layer model, with a comma-free path."""
    path = tmp_path_factory.mktemp("differences") / "table.json"
    differences = np.random.default_rng(0).uniform(0.05, 1.5, (1, 8, 8)).round(3)
    differences[0, 2, 5] = 0  # twins, as a checkpoint made of copies of one dense model may have
    values = differences.tolist()
    document = DifferenceDocument(
        schema=SCHEMA,
        model_sha256=MODEL,
        text_sha256=MODEL,
        tokens=1,
        rows=[[1] * 8],
        differences=values,
        peaks=[[1.0] * 8],
        super_experts=[],
    )
    write_differences(document, path)
    return path


def _policy(name: str, k: int, table: Path) -> Policy:
    return parse_policy(f"{name}:table={table}" if name == "similar" else name, top_k=k)


def _softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    y: Array = (e / e.sum(axis=1, keepdims=True)).astype(np.float32)
    return y


def test_topk_is_mixtrals_own_router() -> None:
    config = MixtralConfig(hidden_size=32, num_local_experts=8, num_experts_per_tok=2)
    router = MixtralTopKRouter(config)
    torch.manual_seed(0)
    torch.nn.init.normal_(router.weight)
    hidden = torch.randn(100, 32)
    with torch.no_grad():
        router_logits, scores, indices = router(hidden)
        expected = torch.zeros(100, 8).scatter_(1, indices, scores)
        probabilities = torch.softmax(router_logits, dim=-1).numpy()
    np.testing.assert_allclose(TopK(2).select(routed(probabilities), EVEN), expected.numpy(), rtol=1e-6)


@given(logits, st.sampled_from(POLICY_NAMES), st.integers(1, 8), st.one_of(st.just(EVEN), forecasts()))
def test_every_policy_keeps_its_invariants(table: Path, x: Array, name: str, k: int, forecast: LayerForecast) -> None:
    k = min(k, 3) if name == "similar" else k
    probabilities = _softmax(x)
    before = probabilities.copy()
    policy = _policy(name, k, table)
    weights = policy.select(routed(probabilities), forecast)
    assert weights.dtype == np.float32
    assert weights.shape == probabilities.shape
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
    assert ((weights > 0).sum(axis=1) <= (1 if name == "top1" else k)).all()
    np.testing.assert_array_equal(probabilities, before)
    np.testing.assert_array_equal(policy.select(routed(probabilities), forecast), weights)
    best = probabilities.max(axis=1)
    kept = ((weights > 0) & (probabilities == best[:, None])).any(axis=1)
    if name in ("topk", "top1", "wdmoe") or (name in ("bottleneck", "capacity") and k <= 2):
        assert kept.all()
    if name in NO_SLOWER:
        top = TopK(k).select(routed(probabilities), forecast)
        assert predicted_s(weights > 0, forecast) <= predicted_s(top > 0, forecast) * (1 + 1e-9)


@given(logits, st.sampled_from(NO_SLOWER[2:]))
@example(np.array([[0.125, 0, 2**-23, 0, 0, 0, 0, 0]], np.float32), "subset")  # one unit in the last place
def test_one_token_on_even_links_is_top_2_or_less(table: Path, x: Array, name: str) -> None:
    """There is nothing to gain; only wdmoe drops all the same, where the gate is peaked."""
    probabilities = _softmax(x[:1])
    weights = _policy(name, 2, table).select(routed(probabilities), EVEN)
    top = TopK(2).select(routed(probabilities), EVEN)
    if name == "wdmoe":
        assert (top[weights > 0] > 0).all()
    else:
        assert weights.sum() == pytest.approx(1)
        assert top[weights > 0].sum() == pytest.approx(1, abs=1e-6)


def test_options_are_read_from_text(table: Path) -> None:
    assert parse_policy("topk:k=3", top_k=2) == TopK(3)
    assert parse_policy("topk", top_k=2) == TopK(2)
    assert parse_policy("wdmoe:survivors=none,gain=1.5", top_k=2) == Wdmoe(2, survivors="none", gain=1.5)
    assert parse_policy("bottleneck:move=true,factor=2", top_k=2) == Bottleneck(2, move=True, factor=2)
    similar = parse_policy(f"similar:table={table},budget=0.1", top_k=2, model_sha256=MODEL)
    assert isinstance(similar, Similar)
    assert similar.table.values.shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("best", "policy 'best' is unknown: choose from topk"),
        ("topk:q=3", "has no option 'q=3': it knows k, keep, survivors="),
        ("topk:k", "has no option 'k'"),
        ("topk:k=two", "policy 'topk:k=two': Expected `int`"),
        ("topk:k=0", "Expected `int` >= 1"),
        ("wdmoe:start=0.9,stop=0.5", "start=0.9 is above stop=0.5"),
        ("wdmoe:step=0", "Expected `float` > 0.0"),
        ("wdmoe:step=1e-9", "step=1e-09 is too small"),
        ("wdmoe:gain=nan", "gain"),
        ("wdmoe:renormalise=false", "renormalise=false is survivors=none"),
        ("wdmoe:survivors=some", "Invalid enum value 'some'"),
        ("subset:k=13", "Expected `int` <= 12"),
        ("topk:keep=/nowhere/t.json", "can't read /nowhere/t.json"),
        ("bottleneck:factor=0.5", "Expected `float` >= 1.0"),
        ("bottleneck:move=maybe", "Expected `bool`"),
        ("capacity:slack=0", "Expected `float` >= 1.0"),
        ("subset:share=1.1", "Expected `float` <= 1.0"),
        ("subset:price=0", "Expected `float` >= 1e-06"),
        ("similar", "missing required field `table`"),
        ("similar:table=/nowhere/t.json", "can't read /nowhere/t.json: No such file or directory"),
        ("similar:table=/,budget=0.1", "can't read /: Is a directory"),
    ],
)
def test_bad_policies_are_one_clear_line(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        parse_policy(text, top_k=2)
    assert "\n" not in str(caught.value)


def test_a_table_of_another_model_is_refused(table: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is for another model .*measure its table again"):
        parse_policy(f"similar:table={table}", top_k=2, model_sha256="1" * 64)
    broken = tmp_path / "broken.json"
    for text, says in (
        ("{}", "missing required field"),
        ("no", "is not a table"),
        (
            table.read_text().replace('"schema":2', '"schema":1'),
            "has schema 1, this version reads 2: make a new one with",
        ),
        (table.read_text().replace('"differences":[[[', '"differences":[[[7],['), r"not \[layers\]"),
    ):
        broken.write_text(text)
        with pytest.raises(ValueError, match=says):
            parse_policy(f"similar:table={broken}", top_k=2)


def test_a_table_of_another_shape_is_refused(table: Path) -> None:
    probabilities = np.full((1, 64), 1 / 64, np.float32)
    for text in (f"similar:table={table}", f"wdmoe:keep={table}"):
        with pytest.raises(ValueError, match="does not fit layer 0 of 64 experts"):
            parse_policy(text, top_k=2).select(routed(probabilities), LayerForecast.even(0, 64))
