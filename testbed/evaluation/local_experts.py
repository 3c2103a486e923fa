"""All experts of a bundle in this process, without a network: with the nodes' graphs and kernels, or on a GPU.

For long evaluations of the quality of answers, where time doesn't matter.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from bs_coordinator.engine.experts import ExpertOutput, Ready
from bs_coordinator.resident.wire_rounding import round_to_wire
from bs_coordinator.selection.forecast import LayerForecast
from edge_node.experts import ExpertRuntime
from testbed.evaluation.torch_runtime import TorchRuntime
from wire.experts import ExpertId, UnitId, units_of
from wire.manifest import load_manifest
from wire.tensors import Array, WireDtype


class _Runtime(Protocol):
    def run(self, id: UnitId, x: Array) -> Array:
        """The output of an expert, or slice, float32 [tokens, hidden], which the next call may overwrite."""
        ...


class LocalExperts:
    """`bs_coordinator.engine.experts.Experts` without nodes.

    Attributes:
        forecasts: returns the forecast of a layer; if None, all experts cost the same.
        lost: indices of experts that are unavailable in every layer.
        pairs: (token, expert) pairs asked so far.
        tokens: hidden states asked for so far, over all layers.
    """

    def __init__(
        self, bundle: Path, *, threads: int, wire: WireDtype = WireDtype.FP32, device: str | None = None
    ) -> None:
        """Load all experts.

        Args:
            threads: computing threads on the CPU.
            wire: wire dtype; hidden states are rounded as if they were sent with it.
            device: torch's name of the device that computes the experts (`TorchRuntime`); None for onnxruntime on the
                CPU, as on nodes.

        Raises:
            WdmoeError: the bundle is damaged, or can't be computed on that device.
        """
        manifest = load_manifest(bundle)
        self.forecasts: Callable[[int], LayerForecast] | None = None
        self.lost: frozenset[int] = frozenset()
        self.pairs = self.tokens = 0
        self._experts, self._slices = manifest.dims.experts, manifest.dims.slices
        self._wire = wire
        self._runtime: _Runtime = (
            ExpertRuntime(bundle, manifest, [entry.id for entry in manifest.experts], threads=threads)
            if device is None
            else TorchRuntime(bundle, manifest, device)
        )

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
