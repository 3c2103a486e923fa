"""Estimates made again from recorded samples, and how well they foretold each next one."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from bs_coordinator.links.estimator import LinkSample
from bs_coordinator.links.monitor import LinkMonitor, NodeEstimate

_WARM_UP = 8
"""Samples of a node before its predictions count."""


@dataclass(frozen=True, slots=True)
class ReplayedNode:
    """One node of a log.

    Attributes:
        estimate: at the end.
        samples: of work and probes.
        error: median of |predicted − measured| / measured network time of requests, each predicted from what came
            before it; NaN if there were too few.
        error_p90: the 90th percentile.
    """

    estimate: NodeEstimate
    samples: int
    error: float
    error_p90: float


def replay(samples: Iterable[LinkSample], *, shared_air: bool = False) -> list[ReplayedNode]:
    """SequenceInput samples, in the order of the log, to new estimators."""
    monitor = LinkMonitor(shared_air=shared_air)
    errors: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    last_s = 0.0
    for sample in samples:
        count = counts[sample.node] = counts.get(sample.node, 0) + 1
        if sample.rows and count > _WARM_UP:
            predicted_s = monitor.link_s(sample.node, down_bytes=sample.down_bytes, up_bytes=sample.up_bytes)
            errors.setdefault(sample.node, []).append(abs(predicted_s / sample.network_s - 1))
        monitor.observe([sample])
        last_s = max(last_s, sample.time_s)
    return [
        ReplayedNode(
            estimate=estimate,
            samples=counts[estimate.node],
            error=float(np.median(errors.get(estimate.node, [np.nan]))),
            error_p90=float(np.quantile(errors.get(estimate.node, [np.nan]), 0.9)),
        )
        for estimate in monitor.estimates(last_s)
    ]
