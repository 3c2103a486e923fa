"""What nodes and links were forecast to cost, as runs on them sampled it: kept, and given to cells in this process."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bs_coordinator.links import NodeEstimate
from bs_coordinator.selection.forecast import Float, LayerForecast
from testbed.experiment.plan import Cell
from testbed.experiment.rundir import RunDir

_COSTS = ("fixed_s", "expert_s", "row_air_s", "row_compute_s")
"""Of `LayerForecast`, by node."""
ESTIMATE, FORECAST, TRUTH = "estimate", "forecast", "truth"
"""Kinds of link samples."""

LinkRow = tuple[str, str, str, float]
"""Node, kind, quantity, value."""


def forecast_rows(nodes: Sequence[str], forecast: LayerForecast) -> list[LinkRow]:
    """Rows of `link_samples` for what selection is told."""
    return [
        (node, FORECAST, f"{cost.removesuffix('_s')}_ms", 1e3 * float(getattr(forecast, cost)[i]))
        for i, node in enumerate(nodes)
        for cost in _COSTS
    ]


def estimate_rows(estimates: Iterable[NodeEstimate]) -> list[LinkRow]:
    """Rows of `link_samples` for what is believed of the links."""
    return [
        (node.node, ESTIMATE, quantity, value)
        for node in estimates
        for quantity, value in (
            ("rtt_ms", 1e3 * node.link.rtt_s),
            ("rtt_std_ms", 1e3 * node.link.rtt_std_s),
            ("down_mbps", node.link.down_mbps),
            ("down_std_mbps", node.link.down_std_mbps),
            ("up_mbps", node.link.up_mbps),
            ("up_std_mbps", node.link.up_std_mbps),
            ("noise_ms", 1e3 * node.link.noise_s),
        )
    ]


@dataclass(slots=True)
class MeasuredCosts:
    """Forecasts as they were sampled; each step of the model takes the next sample, over and over.

    Attributes:
        holders: intp [layers, experts], the node of each expert.
        samples: float64 [samples, 4, nodes], in the order of `_COSTS`.
    """

    holders: NDArray[np.intp]
    samples: Float
    shared_air: bool
    _step: int = -1

    def forecast(self, layer: int) -> LayerForecast:
        """What a node was predicted to cost (see `Experts.forecast`)."""
        self._step += layer == 0
        fixed_s, expert_s, row_air_s, row_compute_s = self.samples[self._step % len(self.samples)]
        return LayerForecast(layer, self.holders[layer], fixed_s, expert_s, row_air_s, row_compute_s, self.shared_air)


def measured_costs(run: RunDir, cell: Cell) -> MeasuredCosts | None:
    """What complete cells on nodes with this cell's bundle and profile sampled; None if there are none."""
    holders, shared_air, samples = None, False, []
    for other in run.cells():
        if (other.bundle, other.profile) != (cell.bundle, cell.profile) or not run.is_complete(other):
            continue
        marker = run.marker(other)
        if not marker.nodes or (holders is not None and marker.holders != holders):
            continue
        holders, shared_air = marker.holders, marker.shared_air
        samples += _samples(run, other, marker.nodes)
    if holders is None or not samples:
        return None
    return MeasuredCosts(np.array(holders, np.intp), np.array(samples), shared_air)


def _samples(run: RunDir, cell: Cell, nodes: Sequence[str]) -> list[list[list[float]]]:
    rows = pq.read_table(
        run.cell_path(cell) / "link_samples.parquet",
        columns=["monotonic_ns", "node", "quantity", "value"],
        filters=[("kind", "=", FORECAST)],
    ).to_pylist()
    result = []
    for _, group in groupby(rows, key=lambda row: row["monotonic_ns"]):
        values = {(row["node"], row["quantity"]): 1e-3 * row["value"] for row in group}
        keys = [[(node, f"{cost.removesuffix('_s')}_ms") for node in nodes] for cost in _COSTS]
        if all(key in values for some in keys for key in some):
            result.append([[values[key] for key in some] for some in keys])
    return result
