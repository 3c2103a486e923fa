"""Estimated links against the ones that were configured, where a run knows both."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from msgspec import Struct

from testbed.report.cells import numbers
from testbed.report.statistics import Float

STD = "_std"
"""`down_std_mbps` is the uncertainty of `down_mbps`."""


class LinkError(Struct, frozen=True, kw_only=True):
    """How far estimates of one quantity of one node's link were off.

    Attributes:
        truth: median of the configured values.
        error_share: median of |estimate − truth| / truth.
    """

    profile: str
    node: str
    quantity: str
    truth: float
    error_share: float
    samples: int


@dataclass(frozen=True, slots=True)
class LinkSeries:
    """One quantity of one node's link over time.

    Attributes:
        truth_s, estimate_s: seconds since the run's first sample.
        std: of the estimates, where they say so.
    """

    node: str
    quantity: str
    truth_s: Float
    truth: Float
    estimate_s: Float
    estimate: Float
    std: Float | None


def link_errors(tables: Sequence[pa.Table]) -> list[LinkError]:
    """By profile, node and quantity; only what has both a truth and an estimate."""
    errors = []
    joined = pa.concat_tables(tables, promote_options="permissive") if tables else None
    profiles = joined["profile"].unique().to_pylist() if joined is not None else []
    for profile in profiles:
        assert joined is not None  # noqa: S101 (there are profiles)
        rows = joined.filter(pa.compute.equal(joined["profile"], profile))
        for series in link_series([rows]):
            truth = truth_at(series)
            known = np.isfinite(truth) & (truth > 0)
            if known.any():
                off = np.abs(series.estimate[known] - truth[known]) / truth[known]
                errors.append(
                    LinkError(
                        profile=profile,
                        node=series.node,
                        quantity=series.quantity,
                        truth=float(np.median(truth[known])),
                        error_share=float(np.median(off)),
                        samples=int(known.sum()),
                    )
                )
    return errors


def link_series(tables: Sequence[pa.Table]) -> list[LinkSeries]:
    """All series of some samples, by node and quantity."""
    if not tables:
        return []
    rows = pa.concat_tables(tables, promote_options="permissive").sort_by("monotonic_ns")
    first_ns = pa.compute.min(rows["unix_ns"]).as_py()
    return list(_series(rows, first_ns))


def truth_at(series: LinkSeries) -> Float:
    """The configured value at each estimate: the latest sample of it, NaN before the first."""
    at = np.searchsorted(series.truth_s, series.estimate_s, side="right") - 1
    return np.where(at >= 0, series.truth[np.maximum(at, 0)], np.nan) if len(series.truth) else np.full(len(at), np.nan)


def _series(rows: pa.Table, first_ns: int) -> Iterator[LinkSeries]:
    quantities = sorted(set(rows["quantity"].to_pylist()))
    for node in sorted(set(rows["node"].to_pylist())):
        of_node = rows.filter(pa.compute.equal(rows["node"], node))
        for quantity in quantities:
            if STD in quantity:
                continue
            truth_s, truth = _values(of_node, "truth", quantity, first_ns)
            estimate_s, estimate = _values(of_node, "estimate", quantity, first_ns)
            name, _, unit = quantity.rpartition("_")
            _, std = _values(of_node, "estimate", f"{name}{STD}_{unit}", first_ns)
            if len(truth) or len(estimate):
                known = std if len(std) == len(estimate) else None
                yield LinkSeries(node, quantity, truth_s, truth, estimate_s, estimate, known)


def _values(rows: pa.Table, kind: str, quantity: str, first_ns: int) -> tuple[Float, Float]:
    both = pa.compute.and_(pa.compute.equal(rows["kind"], kind), pa.compute.equal(rows["quantity"], quantity))
    some = rows.filter(both)
    return (numbers(some, "unix_ns") - first_ns) / 1e9, numbers(some, "value")
