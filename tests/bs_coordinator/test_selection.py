"""Policies against transformers' own router, and their promises for any input."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from bs_coordinator.forecast import LayerForecast
from bs_coordinator.selection import POLICY_NAMES, TopK, parse_policy
from wire.tensors import Array

EVEN = LayerForecast.even(0, 8)
logits = hnp.arrays(np.float32, st.tuples(st.integers(1, 20), st.just(8)), elements=st.floats(-20, 20, width=32))


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
    np.testing.assert_allclose(TopK(2).select(probabilities, EVEN), expected.numpy(), rtol=1e-6)


@given(logits, st.sampled_from(POLICY_NAMES), st.integers(1, 8))
def test_every_policy_keeps_its_promises(x: Array, name: str, k: int) -> None:
    probabilities = _softmax(x)
    before = probabilities.copy()
    weights = parse_policy(name, top_k=k).select(probabilities, EVEN)
    assert weights.dtype == np.float32
    assert weights.shape == probabilities.shape
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
    assert ((weights > 0).sum(axis=1) <= (1 if name == "top1" else k)).all()
    # The most probable expert is always asked.
    best = probabilities.max(axis=1)
    assert ((weights > 0) & (probabilities == best[:, None])).any(axis=1).all()
    np.testing.assert_array_equal(probabilities, before)


def test_options_are_read_from_text() -> None:
    assert parse_policy("topk:k=3", top_k=2) == TopK(3)
    assert parse_policy("topk", top_k=2) == TopK(2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("best", "policy 'best' is unknown: choose from topk"),
        ("topk:q=3", "has no option 'q=3': it knows k="),
        ("topk:k", "has no option 'k'"),
        ("topk:k=two", "policy 'topk:k=two': Expected `int`"),
    ],
)
def test_bad_policies_are_one_clear_line(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        parse_policy(text, top_k=2)
