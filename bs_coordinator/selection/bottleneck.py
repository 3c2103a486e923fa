"""Relieves the slowest node of a layer: the tokens that need it least are dropped there or moved to another node."""

from typing import Annotated

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from bs_coordinator.selection.candidates import Candidates, find_candidates
from bs_coordinator.selection.demand import Chosen, assign_by_preference, demand, shares_of
from bs_coordinator.selection.differences import DifferenceTable
from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.selection.one_token import OneToken, asked_experts
from bs_coordinator.selection.routing import Routing
from bs_coordinator.selection.survivors import Survivors, weigh, weigh_one
from bs_coordinator.selection.topk import Experts
from wire.tensors import Array


class Bottleneck(Struct, frozen=True, forbid_unknown_fields=True):
    """While the slowest node takes more than `factor` times as long as the next slowest, take tokens from it.

    Tokens with the least weight on that node go first, as many as bring it down to that factor. The layer's predicted
    time never rises above top-k's, because a round that does not lower it is discarded.

    Source: reconstructed from the testbed of arXiv 2411.06681; docs/policies.md lists our additions.

    Attributes:
        k: experts per token before anything is dropped.
        factor: how much slower than the next slowest node the slowest may be.
        limit: a token stays on a node that has at least this share of its weight. At 0.5 or less and with `k` 2, its
            most probable expert is never dropped.
        move: a token taken from a node asks its next-best expert elsewhere, if that expert's node has time.
        worth: a round must lower the layer's time by more than this share.
        survivors: rule for the weights of tokens that lost or changed an expert.
        keep: table of the experts that are never dropped.
    """

    k: Experts
    factor: Annotated[float, Meta(ge=1)] = 1.1
    limit: Annotated[float, Meta(ge=0, le=1)] = 0.5
    move: bool = True
    worth: Annotated[float, Meta(ge=0, lt=1)] = 0.02
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
        top = chosen = asked_experts(found.shares)
        layer_s = costs.layer_s(top)
        for _ in range(2 * len(costs.fixed_s)):
            relieved = self._relieve_single(found, chosen, costs)
            relieved_s = costs.layer_s(relieved)
            if relieved_s >= layer_s * (1 - self.worth):
                break
            layer_s, chosen = relieved_s, relieved
        return weigh_one(routing, chosen, self.survivors)

    def _relieve_single(self, found: Candidates, chosen: list[int], costs: OneToken) -> list[int]:
        """The token's experts after one round; the same list if no node exceeds the factor or no expert may go."""
        asked = costs.asked(chosen)
        times_s = {node: costs.node_s(node, count) for node, count in asked.items()}
        slowest = min(times_s, key=lambda node: (-times_s[node], node))
        time_s = times_s.pop(slowest)
        target_s = self.factor * max(times_s.values(), default=0.0)
        gone = [expert for expert in chosen if costs.asks(expert, slowest)]
        (p,) = found.scores.tolist()
        share = sum(p[expert] for expert in gone) / sum(p[expert] for expert in chosen)
        if not times_s or time_s <= target_s or share >= self.limit:
            return chosen
        if found.pinned is not None and found.pinned[0, gone].any():
            return chosen
        kept = [expert for expert in chosen if expert not in gone]
        if self.move:
            # Nodes that can take on one more expert and still meet the target.
            able = [n for n, s in enumerate(costs.with_one_more_s(asked)) if s <= target_s and n != slowest]
            (liked,) = found.preference.tolist()
            others = [e for e, node in enumerate(costs.holder) if node in able and e not in chosen and liked[e] > 0]
            kept += sorted(others, key=lambda expert: -liked[expert])[:1]
        return kept

    def select_batch(self, routing: Routing, forecast: LayerForecast) -> Array:
        """Gate weights of any number of tokens."""
        on_node = forecast.node_map()
        found = find_candidates(routing, forecast, self.k, self.keep)
        weights = found.shares
        asked = demand(weights > 0, on_node)
        layer_s = forecast.layer_s(*asked)
        # Each round lowers the layer's time, so this ends anyway; the bound limits the worst case.
        for _ in range(2 * on_node.shape[1]):
            chosen = self._relieve(found, weights, on_node, asked, forecast)
            if chosen is None:
                break
            asked = demand(chosen, on_node)
            relieved_s = forecast.layer_s(*asked)
            if relieved_s >= layer_s * (1 - self.worth):
                break
            layer_s, weights = relieved_s, shares_of(found.scores, chosen)
        return weigh(routing, weights > 0, self.survivors)

    def _relieve(
        self,
        found: Candidates,
        weights: Array,
        on_node: Array,
        asked: tuple[NDArray[np.int64], NDArray[np.int64]],
        forecast: LayerForecast,
    ) -> Chosen | None:
        """bool [tokens, experts] after one round; None if no node exceeds the factor or no token may go."""
        rows, experts = asked
        time_s = forecast.node_s(rows, experts)
        slowest = int(time_s.argmax())
        next_s = float(np.delete(time_s, slowest).max(initial=0.0))
        target_s = self.factor * next_s
        if time_s[slowest] <= target_s or next_s == 0:
            return None
        chosen = weights > 0
        here = on_node[:, slowest] > 0
        share = weights @ here.astype(np.float32)
        candidates = np.flatnonzero((share > 0) & (share < self.limit) & chosen[:, ~here].any(axis=1))
        if found.pinned is not None:
            candidates = candidates[~found.pinned[np.ix_(candidates, here)].any(axis=1)]
        if not len(candidates):
            return None
        row_s = forecast.row_air_s + forecast.row_compute_s
        excess = np.ceil((time_s[slowest] - target_s) / max(row_s[slowest], 1e-12))
        candidates = candidates[np.argsort(share[candidates], kind="stable")][: int(min(excess, len(candidates)))]
        moved = np.full(len(candidates), -1, np.intp)
        if self.move:
            # Rows that each other node can take on and still meet the target, assuming one more expert there.
            ready_s = forecast.fixed_s + (experts + 1) * forecast.expert_s + rows * row_s
            room = np.floor((target_s - ready_s) / np.maximum(row_s, 1e-12) + 1e-9)
            wanted = np.where(chosen[candidates] | here, np.float32(0), found.preference[candidates])
            # Tokens that would lose most weight choose first.
            moved = assign_by_preference(
                wanted[::-1], forecast.holder, np.minimum(room, len(candidates)).astype(np.int64)
            )[0][::-1]
        chosen[np.ix_(candidates, here)] = False
        chosen[candidates[moved >= 0], moved[moved >= 0]] = True
        return chosen
