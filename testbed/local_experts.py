"""All experts of a bundle in this process: the same graphs and kernels as on nodes, no network.

For long evaluations, where the question is the answers' quality and not the time they take.
"""

from pathlib import Path

import numpy as np

from bs_coordinator.forecast import LayerForecast
from bs_coordinator.model import ExpertOutput
from edge_node.runtime import ExpertRuntime
from wire.experts import ExpertId
from wire.manifest import load_manifest
from wire.tensors import Array


class LocalExperts:
    """`bs_coordinator.model.Experts` without nodes."""

    def __init__(self, bundle: Path, *, threads: int) -> None:
        manifest = load_manifest(bundle)
        self._experts = manifest.dims.experts
        self._runtime = ExpertRuntime(bundle, manifest, [e.id for e in manifest.experts], threads=threads)

    def apply(self, layer: int, hidden: Array, gate: Array) -> ExpertOutput:
        """See `Experts.apply`."""
        output = np.zeros(hidden.shape, np.float32)
        for expert in np.flatnonzero(gate.any(axis=0)).tolist():
            rows = np.flatnonzero(gate[:, expert])
            y = self._runtime.run(ExpertId(layer, expert), hidden[rows])
            output[rows] += y * gate[rows, expert, None]
        return ExpertOutput(output)

    def forecast(self, layer: int) -> LayerForecast:
        """All experts cost the same here."""
        return LayerForecast.even(layer, self._experts)
