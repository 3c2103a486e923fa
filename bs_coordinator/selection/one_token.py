"""What one token's experts cost, on plain numbers.

While decoding, a choice is waited for in every layer, and for a handful of numbers numpy takes many times as long. The
arithmetic is `LayerForecast`'s.
"""

from collections.abc import Collection, Iterable

import numpy as np

from bs_coordinator.selection.demand import Chosen
from bs_coordinator.selection.forecast import LayerForecast
from wire.tensors import Array


class OneToken:
    """A forecast for who asks for a single row of each node.

    Attributes:
        holder: by expert, its node.
        fixed_s, expert_s, row_s: by node, before the first row, for each distinct expert, for the row.
    """

    def __init__(self, forecast: LayerForecast) -> None:
        self.holder: list[int] = forecast.holder.tolist()
        self.fixed_s: list[float] = forecast.fixed_s.tolist()
        self.expert_s: list[float] = forecast.expert_s.tolist()
        self.row_s: list[float] = (forecast.row_air_s + forecast.row_compute_s).tolist()
        self._air_s: list[float] | None = forecast.row_air_s.tolist() if forecast.shared_air else None

    def asked(self, experts: Iterable[int]) -> dict[int, int]:
        """By node that holds any of them, how many."""
        counts: dict[int, int] = {}
        for expert in experts:
            node = self.holder[expert]
            counts[node] = counts.get(node, 0) + 1
        return counts

    def node_s(self, node: int, experts: int, rows: int = 1) -> float:
        """Time of a request for so many experts."""
        return self.fixed_s[node] + experts * self.expert_s[node] + rows * self.row_s[node]

    def with_one_more_s(self, asked: dict[int, int]) -> list[float]:
        """By node, its time if it computes one row and one distinct expert more than it is asked for."""
        return [self.node_s(n, asked.get(n, 0) + 1, rows=1 + (n in asked)) for n in range(len(self.fixed_s))]

    def layer_s(self, experts: Iterable[int]) -> float:
        """Time until the last answer."""
        times_s = {node: self.node_s(node, count) for node, count in self.asked(experts).items()}
        if self._air_s is None:
            return max(times_s.values(), default=0.0)
        air_s = self._air_s
        return sum(air_s[n] for n in times_s) + max((s - air_s[n] for n, s in times_s.items()), default=0.0)


def asked_experts(weights: Array) -> list[int]:
    """The experts that have any of the weight of float32 [1, experts]."""
    return [expert for expert, weight in enumerate(weights[0].tolist()) if weight]


def one_row(experts: Collection[int], count: int) -> Chosen:
    """bool [1, `count`], true for these experts."""
    chosen = np.zeros((1, count), np.bool_)
    chosen[0, list(experts)] = True
    return chosen
