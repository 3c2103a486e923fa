"""Caps each node's rows by its speed; rows above the cap go to other nodes or are dropped."""

import math
from collections.abc import Iterable, Iterator
from typing import Annotated

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from bs_coordinator.selection.candidates import Candidates, find_candidates
from bs_coordinator.selection.demand import Chosen, assign_by_preference, demand, no_slower
from bs_coordinator.selection.differences import DifferenceTable
from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.selection.one_token import OneToken, asked_experts
from bs_coordinator.selection.routing import Routing
from bs_coordinator.selection.survivors import Survivors, weigh, weigh_one
from bs_coordinator.selection.topk import Experts
from wire.tensors import Array


class Capacity(Struct, frozen=True, forbid_unknown_fields=True):
    """Cap each node at the rows it can answer by a common deadline; overflow goes to the next-best expert with room.

    The deadline is the time by which all nodes together could answer all rows, or the time that the pairs that must
    stay need if that is longer, times `slack`. The layer's predicted time never rises above top-k's: where it would,
    top-k is used.

    Source: after arXiv 2503.05066, whose caps are equal; docs/policies.md lists our additions.

    Attributes:
        k: experts per token before anything is dropped.
        slack: factor on the deadline.
        limit: (token, expert) pairs with at least this share of their token's weight stay. At 0.5 and with `k` 2,
            these are each token's most probable expert.
        move: overflow may go to other experts; otherwise it is dropped.
        survivors: rule for the weights of tokens that lost or changed an expert.
        keep: table of the experts that are never dropped.
    """

    k: Experts
    slack: Annotated[float, Meta(ge=1)] = 1.0
    limit: Annotated[float, Meta(ge=0, le=1)] = 0.5
    move: bool = True
    survivors: Survivors = "total"
    keep: DifferenceTable | None = None

    def select(self, routing: Routing, forecast: LayerForecast) -> Array:
        """Gate weights, as `Policy.select` defines them."""
        if len(routing.weights) == 1:
            return self.select_single(routing, forecast)
        return self.select_batch(routing, forecast)

    def select_single(self, routing: Routing, forecast: LayerForecast) -> Array:
        """Gate weights of one token; what `select_batch` gives for it, but several times faster."""
        costs = OneToken(forecast)
        found = find_candidates(routing, forecast, self.k, self.keep)
        (liked,), (share,) = found.preference.tolist(), self._claims(found).tolist()
        top = asked_experts(found.shares)
        caps = self._single_caps(share, top, costs)
        kept: list[int] = []
        over: list[int] = []
        used = [0] * len(caps)
        # In each node's queue, pairs that must stay come first, then the others by weight.
        for expert in sorted(top, key=lambda e: (share[e] < self.limit, -share[e])):
            node = costs.holder[expert]
            used[node] += 1
            (over if used[node] > caps[node] and share[expert] < self.limit else kept).append(expert)
        if not over:
            return weigh_one(routing, top, self.survivors)
        if self.move:
            for expert in kept:
                caps[costs.holder[expert]] -= 1
            others = sorted((e for e, x in enumerate(liked) if x > 0 and e not in top), key=lambda e: -liked[e])
            for _ in over:
                expert = next((e for e in others if caps[costs.holder[e]] > 0 and e not in kept), -1)
                if expert >= 0:
                    caps[costs.holder[expert]] -= 1
                    kept.append(expert)
        kept = kept or [liked.index(max(liked))]
        slower = costs.layer_s(kept) > costs.layer_s(top)
        return weigh_one(routing, top if slower else kept, self.survivors)

    def _claims(self, found: Candidates) -> Array:
        """The shares, with those of experts that are never dropped raised to what must stay."""
        return found.shares if found.pinned is None else np.where(found.pinned, np.float32(1), found.shares)

    def _single_caps(self, share: list[float], top: list[int], costs: OneToken) -> list[int]:
        """By node, the rows that it can answer by the deadline."""
        must = costs.asked(expert for expert in top if share[expert] >= self.limit)
        kept_s = max((costs.node_s(node, count) for node, count in must.items()), default=0.0)
        asked = costs.asked(top)
        row_s = [max(s, 1e-12) for s in costs.row_s]
        ready_s = [f + max(asked.get(n, 0), 1) * costs.expert_s[n] for n, f in enumerate(costs.fixed_s)]
        deadline_s = self.slack * max(kept_s, fill_s(ready_s, row_s, len(top)))
        rows = ((deadline_s - ready) / row + 1e-6 for ready, row in zip(ready_s, row_s, strict=True))
        return [int(min(max(r, 0), len(top))) for r in rows]

    def select_batch(self, routing: Routing, forecast: LayerForecast) -> Array:
        """Gate weights of any number of tokens."""
        found = find_candidates(routing, forecast, self.k, self.keep)
        weights = self._claims(found)
        caps = self._caps(weights, forecast)
        token, expert = np.nonzero(weights)
        share = weights[token, expert]
        # In each node's queue, pairs that must stay come first, then the others by weight.
        order = np.lexsort((token, -share, share < self.limit))
        token, expert, share = token[order], expert[order], share[order]
        queue = forecast.holder[expert][:, None] == np.arange(len(caps))
        position = (queue.cumsum(axis=0) * queue).sum(axis=1)
        over = (position > caps[forecast.holder[expert]]) & (share < self.limit)
        top = weights > 0
        if not over.any():
            return weigh(routing, top, self.survivors)
        chosen = top.copy()
        chosen[token[over], expert[over]] = False
        if self.move:
            room = caps - queue[~over].sum(axis=0)
            for some in _once_each(token[over]):
                wanted = np.where(top[some] | chosen[some], np.float32(0), found.preference[some])
                moved, room = assign_by_preference(wanted, forecast.holder, room)
                chosen[some[moved >= 0], moved[moved >= 0]] = True
        chosen = no_slower(_at_least_one(chosen, found.preference), top, forecast)
        return weigh(routing, chosen, self.survivors)

    def _caps(self, weights: Array, forecast: LayerForecast) -> NDArray[np.int64]:
        """int64 [nodes], the rows that each node can answer by the deadline."""
        on_node = forecast.node_map()
        chosen = weights > 0
        _, experts = demand(chosen, on_node)
        kept_rows, kept_experts = demand(weights >= self.limit, on_node)
        kept_s = float(forecast.node_s(kept_rows, kept_experts).max(initial=0.0))
        ready_s = forecast.fixed_s + np.maximum(experts, 1) * forecast.expert_s
        row_s = np.maximum(forecast.row_air_s + forecast.row_compute_s, 1e-12)
        pairs = int(np.count_nonzero(chosen))
        deadline_s = self.slack * max(kept_s, fill_s(ready_s.tolist(), row_s.tolist(), pairs))
        return np.clip(np.floor((deadline_s - ready_s) / row_s + 1e-6), 0, pairs).astype(np.int64)


def fill_s(ready_s: Iterable[float], row_s: Iterable[float], rows: int) -> float:
    """The earliest time by which all nodes together can finish `rows` rows, if rows could be split.

    Args:
        ready_s: by node, seconds before its first row.
        row_s: by node, seconds per row, above 0.
        rows: to share among the nodes.
    """
    soonest_s, speed, head_start = math.inf, 0.0, 0.0
    # The best prefix of the nodes in order of readiness: with one node too many or too few, the time is later.
    for ready, row in sorted(zip(ready_s, row_s, strict=True)):
        speed += 1 / row
        head_start += ready / row
        soonest_s = min(soonest_s, (rows + head_start) / speed)
    return soonest_s


def _once_each(token: NDArray[np.intp]) -> Iterator[NDArray[np.intp]]:
    """Tokens that may occur several times, in parts in which each occurs once, in the same order."""
    while len(token):
        first = np.sort(np.unique(token, return_index=True)[1])
        yield token[first]
        token = np.delete(token, first)


def _at_least_one(chosen: Chosen, preference: Array) -> Chosen:
    """Give tokens without any expert the one they prefer."""
    alone = np.flatnonzero(~chosen.any(axis=1))
    chosen[alone, preference[alone].argmax(axis=1)] = True
    return chosen
