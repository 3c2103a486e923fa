"""Which experts each token is sent to: pure policies behind one signature, by name.

A policy maps gate probabilities, float32 [tokens, experts] (softmax over all experts), to gate weights of the
same shape: zero for an expert that is not asked, and each row's chosen weights summing to 1.
"""

from collections.abc import Callable

import numpy as np

from wire.tensors import Array

Policy = Callable[[Array], Array]


def topk(k: int) -> Policy:
    """Mixtral's own routing: the k most probable experts, weights renormalised over them.

    Source: "Mixtral of Experts", arXiv 2401.04088, section 2.1.
    """

    def select(probabilities: Array) -> Array:
        chosen = np.argpartition(-probabilities, k - 1, axis=1)[:, :k]
        weights = np.zeros_like(probabilities)
        np.put_along_axis(weights, chosen, np.take_along_axis(probabilities, chosen, axis=1), axis=1)
        weights /= weights.sum(axis=1, keepdims=True)
        return weights

    return select


POLICIES: dict[str, Callable[[int], Policy]] = {
    "topk": topk,
    "top1": lambda k: topk(1),
}
"""By name: what makes a policy from the model's own number of experts per token."""
