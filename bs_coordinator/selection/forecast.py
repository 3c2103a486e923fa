"""The predicted cost of asking one layer's experts, which the estimators pass to the selection policies.

A node that is asked for `rows` hidden states over `experts` of its experts is predicted to answer after
`fixed_s + experts · expert_s + rows · (row_air_s + row_compute_s)`. On dedicated links a layer waits for its
slowest node; on one shared channel the nodes' air times add up instead of overlapping.

Where a bundle cuts experts into slices, asking for an expert asks the holder of each of its slices, and what is said
here of a node's experts holds for its slices.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from wire.tensors import Array

Float = NDArray[np.float64]
Index = NDArray[np.intp]


@dataclass(frozen=True, slots=True, eq=False)
class LayerForecast:
    """Predicted costs of one layer's experts. All times in seconds.

    Attributes:
        layer: index of the layer.
        holder: intp [experts], index of the node that would be asked for each expert; of several that hold slices of
            it, the slowest.
        fixed_s: float64 [nodes], an empty request: round trip, queue, per-request overhead.
        expert_s: float64 [nodes], each distinct expert of a request (reading its weights).
        row_air_s: float64 [nodes], transfer of one hidden state to the node and back.
        row_compute_s: float64 [nodes], computing one more row.
        shared_air: whether all links share one channel.
        available: bool [experts], which experts can be asked at all, at least one; None for all.
        slice_holders: intp [experts, slices], index of the node that would be asked for each slice; None if experts are
            whole.
        left: bool [experts, slices], which slices can be asked, where every expert of the layer lacks some: then
            experts that have any are available. None as long as an expert has all.
    """

    layer: int
    holder: Index
    fixed_s: Float
    expert_s: Float
    row_air_s: Float
    row_compute_s: Float
    shared_air: bool = False
    available: NDArray[np.bool_] | None = None
    slice_holders: Index | None = None
    left: NDArray[np.bool_] | None = None

    @classmethod
    def even(cls, layer: int, experts: int) -> "LayerForecast":
        """A forecast with each expert on its own node and all nodes alike, for use before anything is measured."""
        ones = np.full(experts, 1e-3)
        return cls(layer, np.arange(experts), ones, ones, ones, ones)

    @property
    def one_row_s(self) -> Float:
        """float64 [experts], time of one hidden state to each expert and back, with nothing else asked."""
        if self.slice_holders is not None:
            slowest_s: Float = self._alone_s().max(axis=1)
            return slowest_s
        per_node = self.fixed_s + self.expert_s + self.row_air_s + self.row_compute_s
        time_s: Float = per_node[self.holder]
        return time_s

    def node_map(self) -> Array:
        """float32 [experts, nodes], how many units of an expert a node is asked for: 1 or 0 where experts are whole.

        A product with it sums over experts by node.
        """
        nodes = np.arange(len(self.fixed_s))
        if self.slice_holders is None:
            return np.equal.outer(self.holder, nodes).astype(np.float32)
        counts: Array = np.equal.outer(self.slice_holders, nodes).sum(axis=1, dtype=np.float32)
        return counts

    def _alone_s(self) -> Float:
        """float64 [experts, nodes], time of each node for one hidden state to an expert, with nothing else asked."""
        units = self.node_map()
        return self.node_s(np.minimum(units, 1), units)

    def of_experts(self, slices: int) -> "LayerForecast":
        """The forecast of experts, from this one of units: each expert is `slices` units in succession.

        An expert is available if all its slices are. Only where no expert is, what is left of them is available.
        """
        if slices == 1:
            return self
        cut = replace(self, slice_holders=self.holder.reshape(-1, slices))
        if self.available is not None:
            some: NDArray[np.bool_] = self.available.reshape(-1, slices)
            whole = np.array([all(row) for row in some.tolist()])
            if whole.any():
                cut = replace(cut, available=whole)
            else:
                cut = replace(cut, available=np.array([any(row) for row in some.tolist()]), left=some)
        return replace(cut, holder=cut._alone_s().argmax(axis=1))

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
        return float(answered_s(self.node_s(rows, experts), rows * self.row_air_s, shared_air=self.shared_air))


def answered_s(time_s: Float, air_s: Float, *, shared_air: bool) -> Float:
    """Time until the last node of a layer has answered, float64 [...].

    On dedicated links that is the slowest node's time. On one shared channel all air times add up before the slowest
    of the rest: requests take turns on the air, and so do answers.

    Args:
        time_s: float64 [..., nodes], each node's time with the channel for itself; zero for a node that is not asked.
        air_s: float64 [..., nodes], the part of it that is spent on the air.
        shared_air: whether all links share one channel.
    """
    if not shared_air:
        slowest_s: Float = time_s.max(axis=-1, initial=0.0)
        return slowest_s
    shared_s: Float = air_s.sum(axis=-1) + (time_s - air_s).max(axis=-1, initial=0.0)
    return shared_s
