"""Compares estimated links with configured ones, in runs that know both."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from msgspec import Struct

from testbed.run_directory.cell_rows import numbers
from testbed.run_directory.machine_tables import ESTIMATE, TRUTH
from testbed.statistics import Float

STD = "_std"
"""Part of a quantity's name: `down_std_mbps` is the standard deviation of `down_mbps`."""


class LinkError(Struct, frozen=True, kw_only=True):
    """Error of the estimates of one quantity of one node's link.

    Attributes:
        truth: median of the configured values.
        error_share: median of |estimate − truth| / truth.
        samples: number of estimates.
    """

    profile: str
    node: str
    quantity: str
    truth: float
    error_share: float
    samples: int


@dataclass(frozen=True, slots=True)
class Samples:
    """One quantity over time.

    Attributes:
        s: float64 [n], seconds of measurement; the pauses between cells are left out.
        value: float64 [n], NaN between two cells, which interrupts the line of a plot.
    """

    s: Float
    value: Float


@dataclass(frozen=True, slots=True)
class LinkSeries:
    """One quantity of one node's link over some cells.

    Attributes:
        truth, estimate: configured and estimated values.
        at_estimate: configured value at each estimate, NaN if there is none.
        std: standard deviation of each estimate; None if unknown.
    """

    node: str
    quantity: str
    truth: Samples
    estimate: Samples
    at_estimate: Float
    std: Float | None


def link_errors(cells: Sequence[pa.Table]) -> list[LinkError]:
    """Errors by profile, node and quantity, of quantities with both configured and estimated values.

    Args:
        cells: link samples of each cell, with a column `profile`.
    """
    errors = []
    for profile in dict.fromkeys(profile_of(cell) for cell in cells):
        for series in link_series([cell for cell in cells if profile_of(cell) == profile]):
            truth, estimate = series.at_estimate, series.estimate.value
            known = np.isfinite(truth) & np.isfinite(estimate) & (truth > 0)
            if known.any():
                errors.append(
                    LinkError(
                        profile=profile,
                        node=series.node,
                        quantity=series.quantity,
                        truth=float(np.median(truth[known])),
                        error_share=float(np.median(np.abs(estimate - truth)[known] / truth[known])),
                        samples=int(known.sum()),
                    )
                )
    return errors


def profile_of(cell: pa.Table) -> str:
    """The link profile of a cell's link samples."""
    return str(cell["profile"][0].as_py())


def link_series(cells: Sequence[pa.Table]) -> list[LinkSeries]:
    """Series of all nodes and quantities.

    Args:
        cells: link samples of each cell, at least one row each.
    """
    found: dict[tuple[str, str, str], list[Samples]] = {}
    begin_s = 0.0
    for number, cell in enumerate(cells):
        # Subtract before converting: wall time in ns doesn't fit into a float.
        at_s = numbers(cell.append_column("s", _since_first(cell)), "s") / 1e9 + begin_s
        value = numbers(cell, "value")
        labels = zip(*(cell[name].to_pylist() for name in ("node", "quantity", "kind")), strict=True)
        rows: dict[tuple[str, str, str], list[int]] = {}
        for row, label in enumerate(labels):
            rows.setdefault(label, []).append(row)
        for label, of in rows.items():
            parts = found.setdefault(label, [_NONE] * (len(cells)))
            parts[number] = Samples(at_s[of], value[of])
        begin_s = float(at_s.max()) + _PAUSE_S
    return list(_series(found))


def _since_first(cell: pa.Table) -> pa.ChunkedArray:
    return pc.subtract(cell["unix_ns"], pc.min(cell["unix_ns"]))


def _series(found: dict[tuple[str, str, str], list[Samples]]) -> Iterator[LinkSeries]:
    order = dict.fromkeys(
        (node, quantity) for node, quantity, kind in sorted(found) if kind in (TRUTH, ESTIMATE) and STD not in quantity
    )
    for node, quantity in order:
        name, _, unit = quantity.rpartition("_")
        truth, estimate, std = (
            found.get((node, of, kind), [])
            for of, kind in ((quantity, TRUTH), (quantity, ESTIMATE), (f"{name}{STD}_{unit}", ESTIMATE))
        )
        known = _latest(truth, estimate)
        stds, estimates = _joined(std).value, _joined(estimate)
        yield LinkSeries(
            node, quantity, _joined(truth), estimates, known, stds if len(stds) == len(estimates.value) else None
        )


def _latest(truth: Sequence[Samples], estimate: Sequence[Samples]) -> Float:
    """The last configured value before each estimate of the same cell, joined in the order of the estimates."""
    found = []
    for known, wanted in zip(truth or [_NONE] * len(estimate), estimate, strict=False):
        if len(known.s) and len(wanted.s):
            at = np.searchsorted(known.s, wanted.s, side="right") - 1
            found.append(Samples(wanted.s, np.where(at >= 0, known.value[at], np.nan)))
        else:
            found.append(Samples(wanted.s, np.full(len(wanted.s), np.nan)))
    return _joined(found).value


def _joined(parts: Sequence[Samples]) -> Samples:
    """The samples of all cells one after another, with a NaN after each cell."""
    kept = [part for part in parts if len(part.s)]
    s = [np.append(part.s, part.s[-1]) for part in kept]
    value = [np.append(part.value, np.nan) for part in kept]
    return Samples(np.concatenate([np.empty(0), *s]), np.concatenate([np.empty(0), *value]))


_PAUSE_S = 1.0
_NONE = Samples(np.empty(0), np.empty(0))
