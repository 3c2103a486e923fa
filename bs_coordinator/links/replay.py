"""Replays recorded samples: the estimates they lead to, and how well each sample was predicted by those before it."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from bs_coordinator.links.estimator import LinkSample
from bs_coordinator.links.monitor import LinkMonitor, NodeEstimate

_WARM_UP = 8
"""Samples of a node before the errors of its predictions count."""


@dataclass(frozen=True, slots=True)
class ReplayedNode:
    """One node of a log.

    Attributes:
        estimate: at the end of the log.
        samples: number of samples, of work and probes.
        error: median of |predicted − measured| / measured network time of requests, each predicted from the samples
            before it; NaN if there were too few.
        error_p90: the 90th percentile of the same.
    """

    estimate: NodeEstimate
    samples: int
    error: float
    error_p90: float


def replay(samples: Iterable[LinkSample], *, shared_air: bool = False) -> list[ReplayedNode]:
    """Pass samples to new estimators, in the order of the log; one result per node, by name.

    Args:
        samples: of the log.
        shared_air: whether all links share one half-duplex channel.
    """
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
