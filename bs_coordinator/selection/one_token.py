"""The cost of one token's experts, computed with plain Python numbers.

Decoding waits for a choice in every layer, and for so few numbers numpy takes many times as long. The arithmetic is
that of `LayerForecast`.
"""

from collections.abc import Iterable

from bs_coordinator.selection.forecast import LayerForecast
from wire.tensors import Array


class OneToken:
    """A forecast for a single token, which is one row at each node that it asks.

    Attributes:
        holder: by expert, its node; of several that hold slices of it, the slowest.
        slice_holders: by expert, the nodes of its slices; None if experts are whole.
        fixed_s, expert_s, row_s: by node, seconds of an empty request, per distinct expert and per row.
    """

    def __init__(self, forecast: LayerForecast) -> None:
        self.holder: list[int] = forecast.holder.tolist()
        slices = forecast.slice_holders
        self.slice_holders: list[list[int]] | None = None if slices is None else slices.tolist()
        self.fixed_s: list[float] = forecast.fixed_s.tolist()
        self.expert_s: list[float] = forecast.expert_s.tolist()
        self.row_s: list[float] = (forecast.row_air_s + forecast.row_compute_s).tolist()
        self._air_s: list[float] | None = forecast.row_air_s.tolist() if forecast.shared_air else None

    def asked(self, experts: Iterable[int]) -> dict[int, int]:
        """For each node that holds any of these experts, or a slice of one, how many it holds."""
        counts: dict[int, int] = {}
        for expert in experts:
            if self.slice_holders is not None:
                for node in self.slice_holders[expert]:
                    counts[node] = counts.get(node, 0) + 1
                continue
            node = self.holder[expert]
            counts[node] = counts.get(node, 0) + 1
        return counts

    def asks(self, expert: int, node: int) -> bool:
        """Whether an expert, or a slice of it, is asked of this node."""
        return self.holder[expert] == node if self.slice_holders is None else node in self.slice_holders[expert]

    def node_s(self, node: int, experts: int, rows: int = 1) -> float:
        """Time of a request for this many experts and rows, in seconds."""
        return self.fixed_s[node] + experts * self.expert_s[node] + rows * self.row_s[node]

    def with_one_more_s(self, asked: dict[int, int]) -> list[float]:
        """By node, its time if it computes one more expert, and one more row if it is asked already."""
        return [self.node_s(n, asked.get(n, 0) + 1, rows=1 + (n in asked)) for n in range(len(self.fixed_s))]

    def layer_s(self, experts: Iterable[int]) -> float:
        """Time until the last node has answered, in seconds."""
        times_s = {node: self.node_s(node, count) for node, count in self.asked(experts).items()}
        if self._air_s is None:
            return max(times_s.values(), default=0.0)
        air_s = self._air_s
        return sum(air_s[n] for n in times_s) + max((s - air_s[n] for n, s in times_s.items()), default=0.0)


def asked_experts(weights: Array) -> list[int]:
    """The experts with a weight above 0 in float32 [1, experts]."""
    return [expert for expert, weight in enumerate(weights[0].tolist()) if weight]
