"""All experts of a bundle in this process: the same graphs and kernels as on nodes, no network.

For long evaluations, where the question is the answers' quality and not the time they take.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from bs_coordinator.engine.experts import ExpertOutput, Ready
from bs_coordinator.resident.wire_rounding import round_to_wire
from bs_coordinator.selection.forecast import LayerForecast
from edge_node.experts.runtime import ExpertRuntime
from wire.experts import ExpertId
from wire.manifest import load_manifest
from wire.tensors import Array, WireDtype


class LocalExperts:
    """`bs_coordinator.engine.model.Experts` without nodes.

    Attributes:
        forecasts: what asking for a layer is to be taken to cost; all experts alike when None.
        lost: expert indices that no node can be had for, in any layer.
    """

    def __init__(self, bundle: Path, *, threads: int, wire: WireDtype = WireDtype.FP32) -> None:
        """Load all experts.

        Args:
            wire: what hidden states would travel as; they are rounded as if they did.
        """
        manifest = load_manifest(bundle)
        self.forecasts: Callable[[int], LayerForecast] | None = None
        self.lost: frozenset[int] = frozenset()
        self._experts = manifest.dims.experts
        self._wire = wire
        self._runtime = ExpertRuntime(bundle, manifest, [e.id for e in manifest.experts], threads=threads)

    def begin(self, layer: int, hidden: Array, gate: Array) -> Ready:
        """See `Experts.begin`."""
        hidden = round_to_wire(hidden, self._wire)
        output = np.zeros(hidden.shape, np.float32)
        for expert in np.flatnonzero(gate.any(axis=0)).tolist():
            rows = np.flatnonzero(gate[:, expert])
            y = self._runtime.run(ExpertId(layer, expert), hidden[rows])
            output[rows] += round_to_wire(y * gate[rows, expert, None], self._wire)
        return Ready(ExpertOutput(output))

    def forecast(self, layer: int) -> LayerForecast:
        """See `Experts.forecast`."""
        forecast = self.forecasts(layer) if self.forecasts else LayerForecast.even(layer, self._experts)
        if not self.lost:
            return forecast
        return replace(forecast, available=np.array([e not in self.lost for e in range(self._experts)]))
