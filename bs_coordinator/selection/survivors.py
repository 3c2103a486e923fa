"""The weights of the experts that a policy keeps, when it does not ask all that the model chose.

A kept expert's weight is its score times a factor of the token; the rules differ in that factor. With W the sum of the
model's own weights:

- `total`: the kept experts' weights add up to W, as the model's own do.
- `none`: kept experts have the weights that the model gives them; what is dropped is missing.
- `mass`: W · score ÷ the sum of the model's m best scores, where m experts are kept. With the m best kept this is
  `total`; where better ones are missing, the others don't make up for them. Source: arXiv 2609.04575.
"""

from collections.abc import Collection
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bs_coordinator.selection.demand import Chosen
from bs_coordinator.selection.routing import ROUNDING, Routing, scores_or_weights, totals
from wire.tensors import Array

Survivors = Literal["total", "none", "mass"]
_TINY = 1e-30
"""Score of an expert that is asked although its score is zero, because no better one is available."""


def weigh(routing: Routing, chosen: Chosen, rule: Survivors) -> Array:
    """The weights of chosen experts. A token that asks what the model chose gets exactly the model's weights.

    Args:
        routing: of the tokens.
        chosen: bool [tokens, experts], at least one in each row.

    Returns:
        float32 [tokens, experts], above zero where `chosen`.
    """
    own = routing.weights > 0
    changed = (chosen != own).any(axis=1)
    if not changed.any():
        return routing.weights
    kept = np.where(chosen, np.maximum(scores_or_weights(routing), np.float32(_TINY)), np.float32(0))
    weights = scale(routing, kept, rule)
    exact = chosen & own if rule == "none" else own & ~changed[:, None]
    return np.where(exact, routing.weights, weights)


def scale(routing: Routing, kept: Array, rule: Survivors) -> Array:
    """Scores of kept experts, as weights.

    Args:
        routing: of the tokens.
        kept: float32 [tokens, experts], the scores that count, zero for experts that are not asked.
    """
    if rule == "total":
        whole = kept.sum(axis=1, keepdims=True, dtype=np.float64)
    elif rule == "none":
        whole = _mass(routing, np.count_nonzero(routing.weights, axis=1))
    else:
        whole = _mass(routing, np.count_nonzero(kept, axis=1))
    weights: Array = kept / whole.astype(np.float32) * totals(routing)
    return weights


def weigh_one(routing: Routing, chosen: Collection[int], rule: Survivors) -> Array:
    """The weights of one token's chosen experts; what `weigh` gives, but faster.

    Args:
        routing: of one token.
        chosen: the experts' indices.
    """
    (own,) = routing.weights.tolist()
    if len(chosen) == len(own) - own.count(0.0) and all(own[expert] for expert in chosen):
        return routing.weights
    (scores,) = scores_or_weights(routing).tolist()
    kept = [max(scores[expert], _TINY) for expert in chosen]
    counted = kept
    if rule != "total":
        order = scores if routing.order is None else routing.order[0].tolist()
        count = len(kept) if rule == "mass" else len(own) - own.count(0.0)
        counted = [scores[i] for i in sorted(range(len(scores)), key=order.__getitem__, reverse=True)[:count]]
    # Rounded where arrays of float32 would round, for bitwise equal results.
    whole = float(np.float32(sum(counted)))
    weights = np.zeros(routing.weights.shape, np.float32)
    for expert, score in zip(chosen, kept, strict=True):
        weights[0, expert] = score / whole
    total = sum(own)
    if abs(total - 1) >= ROUNDING:
        weights *= np.float32(total)
    if rule == "none":
        for expert in chosen:
            weights[0, expert] = own[expert] or weights[0, expert]
    return weights


def _mass(routing: Routing, count: NDArray[np.intp]) -> NDArray[np.float64]:
    """Sum of each token's first `count` scores in the model's order, float64 [tokens, 1]."""
    scores = scores_or_weights(routing)
    best = np.argsort(-(scores if routing.order is None else routing.order), axis=1, kind="stable")
    ranked = np.take_along_axis(scores, best, axis=1).astype(np.float64)
    mass: NDArray[np.float64] = np.take_along_axis(ranked.cumsum(axis=1), np.maximum(count[:, None] - 1, 0), axis=1)
    return mass
