"""The WDMoE papers' training-free rule: tokens whose gate does not favour slow experts drop their weakest expert."""

import math
from operator import mul
from typing import Annotated

import numpy as np
from msgspec import Meta, Struct

from bs_coordinator.selection.candidates import find_candidates
from bs_coordinator.selection.differences import DifferenceTable
from bs_coordinator.selection.forecast import Float, LayerForecast
from bs_coordinator.selection.one_token import asked_experts
from bs_coordinator.selection.routing import Routing
from bs_coordinator.selection.survivors import Survivors, weigh, weigh_one
from bs_coordinator.selection.topk import Experts
from wire.tensors import Array

MAX_STEPS = 1000
_TINY_S = 1e-9


class Wdmoe(Struct, frozen=True, forbid_unknown_fields=True):
    """Drop the weakest expert of every token with cos(gate, times) ≤ θ; θ rises until the batch has gained enough.

    The gain is measured by the weight-to-latency ratio: the mean of weight ÷ time over all (token, expert) pairs asked.

    Source: reconstructed from arXiv 2405.03131 and 2411.06681; docs/policies.md lists our additions.

    Attributes:
        k: experts per token before anything is dropped.
        start: first θ.
        step: increment of θ.
        stop: last θ.
        gain: θ stops rising when the ratio exceeds `gain` times top-k's.
        survivors: rule for the remaining weights. The weakest expert goes first, so `mass` is `total`.
        keep: table of the experts that are never dropped.
    """

    k: Experts
    start: Annotated[float, Meta(ge=0, le=1)] = 0.5
    step: Annotated[float, Meta(gt=0, le=1)] = 0.02
    stop: Annotated[float, Meta(ge=0, le=1)] = 0.9
    gain: Annotated[float, Meta(ge=0)] = 1.15
    survivors: Survivors = "total"
    keep: DifferenceTable | None = None

    def __post_init__(self) -> None:
        if self.start > self.stop:
            raise ValueError(f"start={self.start:g} is above stop={self.stop:g}")
        if self.stop - self.start > MAX_STEPS * self.step:
            raise ValueError(f"step={self.step:g} is too small: at most {MAX_STEPS} may lead from start to stop")

    def select(self, routing: Routing, forecast: LayerForecast) -> Array:
        """Gate weights, as `Policy.select` defines them."""
        if len(routing.weights) == 1:
            return self.select_single(routing, forecast)
        return self.select_batch(routing, forecast)

    def select_batch(self, routing: Routing, forecast: LayerForecast) -> Array:
        """Gate weights of any number of tokens."""
        return self._select(routing, forecast, alone=False)

    def select_each(self, routing: Routing, forecast: LayerForecast) -> Array:
        """Gate weights, as `SelectsEach.select_each` defines them."""
        return self._select(routing, forecast, alone=True)

    def _select(self, routing: Routing, forecast: LayerForecast, *, alone: bool) -> Array:
        scores, _, weights, pinned = find_candidates(routing, forecast, self.k, self.keep)
        chosen = weights > 0
        free = chosen if pinned is None else chosen & ~pinned
        time_s = np.maximum(forecast.one_row_s, _TINY_S)
        weakest = np.where(free, weights, np.inf).argmin(axis=1)
        token = np.flatnonzero((np.count_nonzero(chosen, axis=1) > 1) & free.any(axis=1))
        likeness = cosine(scores, time_s)[token]
        if alone:
            theta = self._theta_alone
        else:
            lost = (weights[token, weakest[token]] / time_s[weakest[token]]).astype(np.float64)
            theta = self._theta(likeness, lost, total=float((weights / time_s).sum()), pairs=int(chosen.sum()))
        dropped = token[likeness <= theta]
        chosen[dropped, weakest[dropped]] = False
        return weigh(routing, chosen, self.survivors)

    @property
    def _steps(self) -> int:
        return int((self.stop - self.start) / self.step + 1e-9)

    @property
    def _theta_alone(self) -> float:
        """The θ at which the search of a single token ends.

        The token is dropped from at the first θ that reaches it, so with a `gain` of at least 1 only the last θ
        matters; with a smaller `gain` the first θ is already enough.
        """
        return self.start + (self.step * self._steps if self.gain >= 1 else 0)

    def select_single(self, routing: Routing, forecast: LayerForecast) -> Array:
        """Gate weights of one token; what `select_batch` gives for it, but several times faster."""
        scores, _, weights, pinned = find_candidates(routing, forecast, self.k, self.keep)
        (p,), (share,) = scores.tolist(), weights.tolist()
        time_s = np.maximum(forecast.one_row_s, _TINY_S).tolist()
        likeness = sum(map(mul, p, time_s)) / math.sqrt(sum(map(mul, p, p)) * sum(map(mul, time_s, time_s)))
        top = asked_experts(weights)
        free = top if pinned is None else [expert for expert in top if not pinned[0, expert]]
        if len(top) > 1 and free and likeness <= self._theta_alone:
            top.remove(min(free, key=share.__getitem__))
        return weigh_one(routing, top, self.survivors)

    def _theta(self, likeness: Float, lost: Float, *, total: float, pairs: int) -> float:
        """The θ at which the search ends.

        Every θ starts from top-k again, so all of them can be evaluated at once: a θ reaches the tokens up to it in
        the order of their cosines.

        Args:
            likeness: float64 [n], cosines of the tokens that can drop an expert.
            lost: float64 [n], weight ÷ time of the pair that each of them would drop.
            total: sum of weight ÷ time over the pairs of top-k.
            pairs: number of pairs of top-k.
        """
        thetas = self.start + self.step * np.arange(self._steps + 1)
        order = np.argsort(likeness, kind="stable")
        reached = np.searchsorted(likeness[order], thetas, side="right")
        lost_sum = np.concatenate([[0.0], np.cumsum(lost[order])])[reached]
        ratio = (total - lost_sum) / (pairs - reached) / (total / pairs)
        enough = np.flatnonzero(ratio > self.gain)
        return float(thetas[enough[0] if len(enough) else -1])


def cosine(scores: Array, time_s: Float) -> Float:
    """Cosine between each token's gate and the experts' times, float64 [tokens], from 0 to 1.

    It is low where the probability lies on fast experts: then the weakest chosen one is likely slow, and dropping it
    saves time. With equal times it measures how flat the gate is.

    Args:
        scores: float32 [tokens, experts], over all experts.
        time_s: float64 [experts], above 0.
    """
    p = scores.astype(np.float64)
    likeness: Float = p @ time_s / np.sqrt(np.einsum("te,te->t", p, p) * (time_s @ time_s))
    return likeness
