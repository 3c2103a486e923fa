"""The predicted cost of asking one layer's experts, which the estimators pass to the selection policies.

A node that is asked for `rows` hidden states over `experts` of its experts is predicted to answer after
`fixed_s + experts · expert_s + rows · (row_air_s + row_compute_s)`. On dedicated links a layer waits for its
slowest node; on one shared channel the nodes' air times add up instead of overlapping.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
Index = NDArray[np.intp]


@dataclass(frozen=True, slots=True, eq=False)
class LayerForecast:
    """Predicted costs of one layer's experts. All times in seconds.

    Attributes:
        layer: index of the layer.
        holder: intp [experts], index of the node that would be asked for each expert.
        fixed_s: float64 [nodes], an empty request: round trip, queue, per-request overhead.
        expert_s: float64 [nodes], each distinct expert of a request (reading its weights).
        row_air_s: float64 [nodes], transfer of one hidden state to the node and back.
        row_compute_s: float64 [nodes], computing one more row.
        shared_air: whether all links share one channel.
        available: bool [experts], which experts can be asked at all, at least one; None for all.
    """

    layer: int
    holder: Index
    fixed_s: Float
    expert_s: Float
    row_air_s: Float
    row_compute_s: Float
    shared_air: bool = False
    available: NDArray[np.bool_] | None = None

    @classmethod
    def even(cls, layer: int, experts: int) -> "LayerForecast":
        """A forecast with each expert on its own node and all nodes alike, for use before anything is measured."""
        ones = np.full(experts, 1e-3)
        return cls(layer, np.arange(experts), ones, ones, ones, ones)

    @property
    def one_row_s(self) -> Float:
        """float64 [experts], time of one hidden state to each expert and back, with nothing else asked."""
        per_node = self.fixed_s + self.expert_s + self.row_air_s + self.row_compute_s
        time_s: Float = per_node[self.holder]
        return time_s

    def node_s(self, rows: NDArray[np.number], experts: NDArray[np.number]) -> Float:
        """float64 [..., nodes], each node's time for a request; zero for a node that is not asked.

        Args:
            rows: [..., nodes], hidden states sent to each node.
            experts: [..., nodes], distinct experts asked of each node.
        """
        time_s = self.fixed_s + experts * self.expert_s + rows * (self.row_air_s + self.row_compute_s)
        return np.where(rows > 0, time_s, 0.0)

    def layer_s(self, rows: NDArray[np.int64], experts: NDArray[np.int64]) -> float:
        """Time until the last node has answered; arguments as in `node_s`, int64 [nodes]."""
        time_s = self.node_s(rows, experts)
        if not self.shared_air:
            return float(time_s.max(initial=0.0))
        air_s = rows * self.row_air_s
        return float(air_s.sum() + (time_s - air_s).max(initial=0.0))
