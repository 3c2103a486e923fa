"""Finding out how a router turns its logits into the weights of experts. Pure.

transformers' models agree on what experts are given, not on how routers choose. Most weigh the experts that they choose
in proportion to the softmax or the sigmoid of their logits, and some choose by another vector: the scores plus a bias.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bs_coordinator.selection.routing import Routing
from wire.tensors import Array

_SMALLEST = float(np.finfo(np.float32).tiny)
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.06}


class RoutingRule(NamedTuple):
    """How a layer's router chooses.

    Attributes:
        sigmoid: whether scores are the sigmoid of the logits; otherwise their softmax.
        scale: float32 [experts], a factor of each expert's score; None for none.
        bias: float32 [experts], added to the scores before the largest are chosen; None for none.
        by_scores: whether the largest of scores plus bias are always chosen. Otherwise something else restricts the
            choice, such as groups of experts.
    """

    sigmoid: bool
    scale: Tensor | None
    bias: Tensor | None
    by_scores: bool

    def routing(self, logits: Tensor, weights: Array) -> Routing:
        """The routing of tokens.

        Args:
            logits: of the router [tokens, experts].
            weights: the model's own, float32 [tokens, experts].
        """
        scores = _scores(logits.float(), sigmoid=self.sigmoid, scale=self.scale).clamp(min=_SMALLEST)
        order = None if self.bias is None else (scores + self.bias).cpu().numpy()
        array: Array = scores.cpu().numpy()
        if not self.by_scores:
            # Above all others, in the same order.
            order = array if order is None else order
            order = np.where(weights > 0, order + (np.ptp(order) + 1), order)
        return Routing(weights, array, order)


def find_rule(logits: Tensor, index: Tensor, weights: Tensor, vectors: Sequence[Tensor]) -> RoutingRule | None:
    """The rule by which a router chose for some tokens; None if it is none of those known here.

    Args:
        logits: of the router [tokens, experts].
        index: the chosen experts, int64 [tokens, k].
        weights: of the chosen experts [tokens, k].
        vectors: parameters [experts] of the router, which may be biases or scales.
    """
    # A router may compute in less than its weights' type says: the coarser of the two decides.
    tolerance = max(_TOLERANCE.get(logits.dtype, 1e-3), _TOLERANCE.get(weights.dtype, 1e-3))
    logits, weights = logits.float(), weights.float()
    known = [vector.float() for vector in vectors if vector.shape == logits.shape[1:]]
    for sigmoid in (False, True):
        for scale in (None, *known):
            scores = _scores(logits, sigmoid=sigmoid, scale=scale)
            if _proportional(scores.gather(1, index), weights, tolerance):
                for bias in (None, *known):
                    order = scores if bias is None else scores + bias
                    if _largest_are_chosen(order, index, tolerance):
                        return RoutingRule(sigmoid, scale, bias, by_scores=True)
                return RoutingRule(sigmoid, scale, None, by_scores=False)
    return None


def _scores(logits: Tensor, *, sigmoid: bool, scale: Tensor | None) -> Tensor:
    scores = torch.sigmoid(logits) if sigmoid else torch.softmax(logits, dim=-1)
    return scores if scale is None else scores * scale


def _proportional(scores: Tensor, weights: Tensor, tolerance: float) -> bool:
    """Whether each token's weights are its scores times one positive factor."""
    largest = weights.max(dim=1, keepdim=True).values
    # Of weights that are nearly nothing only the rounding would be compared.
    counts = weights > 1e-4 * largest
    ratio = weights / scores.clamp(min=_SMALLEST)
    factor = ratio.gather(1, weights.argmax(dim=1, keepdim=True))
    close = (ratio - factor).abs() <= tolerance * factor
    return bool((close | ~counts).all() and (largest > 0).all() and counts.sum() > len(weights))


def _largest_are_chosen(order: Tensor, index: Tensor, tolerance: float) -> bool:
    chosen = order.gather(1, index).min(dim=1).values
    others = order.scatter(1, index, -torch.inf).max(dim=1).values
    return bool((others <= chosen + tolerance * chosen.abs()).all())
