"""Forecast costs of nodes and links: sampled in cells on nodes, replayed in cells of this process."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bs_coordinator.links import NodeEstimate
from bs_coordinator.selection.forecast import Float, LayerForecast
from testbed.experiment.recorder import LinkValue
from testbed.plan.cells import Cell
from testbed.run_directory.directory import RunDir
from testbed.run_directory.machine_tables import COUNT, ESTIMATE, FORECAST

_COSTS = ("fixed_s", "expert_s", "row_air_s", "row_compute_s")
"""Attributes of `LayerForecast`, each float64 [nodes]."""
_QUANTITIES = tuple(f"{cost.removesuffix('_s')}_ms" for cost in _COSTS)
"""The same in link samples."""


def forecast_values(nodes: Sequence[str], forecast: LayerForecast) -> list[LinkValue]:
    """The forecast that policies get, as link samples."""
    return [
        LinkValue(node, FORECAST, quantity, 1e3 * float(getattr(forecast, cost)[i]))
        for i, node in enumerate(nodes)
        for cost, quantity in zip(_COSTS, _QUANTITIES, strict=True)
    ]


def estimate_values(estimates: Iterable[NodeEstimate]) -> list[LinkValue]:
    """Link estimates as link samples."""
    return [
        LinkValue(node.node, ESTIMATE, quantity, value)
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


def probing_values(estimates: Iterable[NodeEstimate]) -> list[LinkValue]:
    """What probes of each link took so far, as link samples."""
    return [
        LinkValue(node.node, COUNT, quantity, value)
        for node in estimates
        for quantity, value in (
            ("probe_down_bytes", node.probing.down_bytes),
            ("probe_up_bytes", node.probing.up_bytes),
            ("probes_refused", node.probing.refused),
        )
    ]


@dataclass(slots=True)
class MeasuredCosts:
    """Sampled forecasts in a loop: each step of the model takes the next sample.

    Attributes:
        holders: intp [layers, experts], index of the node that holds each expert.
        samples: float64 [samples, 4, nodes] in seconds: `fixed_s`, `expert_s`, `row_air_s`, `row_compute_s`.
        shared_air: whether all links share one channel.
    """

    holders: NDArray[np.intp]
    samples: Float
    shared_air: bool
    _step: int = -1

    def forecast(self, layer: int) -> LayerForecast:
        """The forecast for a layer (`Experts.forecast`); layer 0 begins a new step."""
        self._step += layer == 0
        fixed_s, expert_s, row_air_s, row_compute_s = self.samples[self._step % len(self.samples)]
        return LayerForecast(layer, self.holders[layer], fixed_s, expert_s, row_air_s, row_compute_s, self.shared_air)


def measured_costs(run: RunDir, cell: Cell) -> MeasuredCosts | None:
    """The forecasts sampled in complete cells on nodes with this cell's bundle and profile; None if there are none."""
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
        keys = [[(node, quantity) for node in nodes] for quantity in _QUANTITIES]
        if all(key in values for some in keys for key in some):
            result.append([[values[key] for key in some] for some in keys])
    return result
