"""All experts of a bundle in this process, with the same graphs and kernels as on nodes but without a network.

For long evaluations of the quality of answers, where time doesn't matter.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from bs_coordinator.engine.experts import ExpertOutput, Ready
from bs_coordinator.resident.wire_rounding import round_to_wire
from bs_coordinator.selection.forecast import LayerForecast
from edge_node.experts import ExpertRuntime
from wire.experts import ExpertId, units_of
from wire.manifest import load_manifest
from wire.tensors import Array, WireDtype


class LocalExperts:
    """`bs_coordinator.engine.experts.Experts` without nodes.

    Attributes:
        forecasts: returns the forecast of a layer; if None, all experts cost the same.
        lost: indices of experts that are unavailable in every layer.
        pairs: (token, expert) pairs asked so far.
        tokens: hidden states asked for so far, over all layers.
    """

    def __init__(self, bundle: Path, *, threads: int, wire: WireDtype = WireDtype.FP32) -> None:
        """Load all experts.

        Args:
            wire: wire dtype; hidden states are rounded as if they were sent with it.
        """
        manifest = load_manifest(bundle)
        self.forecasts: Callable[[int], LayerForecast] | None = None
        self.lost: frozenset[int] = frozenset()
        self.pairs = self.tokens = 0
        self._experts, self._slices = manifest.dims.experts, manifest.dims.slices
        self._wire = wire
        self._runtime = ExpertRuntime(bundle, manifest, [e.id for e in manifest.experts], threads=threads)

    def begin(self, layer: int, hidden: Array, gate: Array) -> Ready:
        """Run the chosen experts of a layer and combine their outputs (`Experts.begin`)."""
        self.pairs += int(np.count_nonzero(gate))
        self.tokens += len(gate)
        hidden = round_to_wire(hidden, self._wire)
        output = np.zeros(hidden.shape, np.float32)
        for expert in np.flatnonzero(gate.any(axis=0)).tolist():
            rows = np.flatnonzero(gate[:, expert])
            for unit in units_of([ExpertId(layer, expert)], self._slices):
                y = self._runtime.run(unit, hidden[rows])
                output[rows] += round_to_wire(y * gate[rows, expert, None], self._wire)
        return Ready(ExpertOutput(output))

    def forecast(self, layer: int) -> LayerForecast:
        """The forecast of a layer, without the lost experts (`Experts.forecast`)."""
        forecast = self.forecasts(layer) if self.forecasts else LayerForecast.even(layer, self._experts)
        if not self.lost:
            return forecast
        return replace(forecast, available=np.array([e not in self.lost for e in range(self._experts)]))
