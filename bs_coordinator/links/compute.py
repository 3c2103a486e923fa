"""How long a node computes for a request, learnt from the times that it reports.

`fixed + experts · expert + rows · row`: the weights of each distinct expert are read once, each row is computed. All
experts of a bundle have the same size and quantisation, so a node's experts share their costs.
"""

import math

from bs_coordinator.links.kalman import RobustFilter

_PRIOR_MS = (0.3, 0.5, 0.2)
_PRIOR_STD_MS = (0.5, 5.0, 1.0)
_FLOOR_MS = (1e-3, 1e-3, 1e-4)
_DRIFT = (0.02, 0.02, 0.02)
_FIRST_NOISE_MS = 0.2
_MIN_NOISE_MS = 0.01
_MODEL_ERROR = 0.05
"""Relative: kernels change with the number of rows, and caches fill."""
_PLAUSIBLE_S = 600.0


class ComputeEstimator:
    """Estimate of one node's compute times. States in ms: (fixed, per expert, per row)."""

    __slots__ = ("_filter", "_time_s")

    def __init__(self) -> None:
        self._time_s = -math.inf
        self._filter = RobustFilter(
            _PRIOR_MS, _PRIOR_STD_MS, drift=_DRIFT, floor=_FLOOR_MS, noise=_FIRST_NOISE_MS, least_noise=_MIN_NOISE_MS
        )

    def observe(self, time_s: float, *, experts: int, rows: int, node_s: float) -> bool:
        """Take in one request; returns False if the values are implausible.

        Args:
            time_s: when the answer arrived.
            experts: distinct experts of the request.
            rows: hidden states of the request.
            node_s: the time that the node reports, without loading experts.
        """
        if not (0 < node_s < _PLAUSIBLE_S and 0 < experts < 1 << 16 and 0 < rows < 1 << 32):
            return False
        if self._time_s > -math.inf:
            self._filter.advance(time_s - self._time_s)
        self._time_s = max(self._time_s, time_s)
        filter = self._filter
        if filter.count == 0:
            filter.noise = max(_FIRST_NOISE_MS, 1e2 * node_s)
        h = (1.0, float(experts), float(rows))
        filter.update(h, 1e3 * node_s, extra_std=_MODEL_ERROR * filter.predict(h))
        return True

    def predict_s(self, experts: int, rows: int) -> float:
        """Predicted compute time of a request with this many distinct experts and rows."""
        return 1e-3 * self._filter.predict((1.0, float(experts), float(rows)))

    @property
    def samples(self) -> int:
        """Number of requests that the estimate is based on."""
        return self._filter.count

    @property
    def costs_s(self) -> tuple[float, float, float]:
        """Seconds per request (queue, decoding, encoding), per distinct expert and per row."""
        fixed_ms, expert_ms, row_ms = self._filter.x
        return 1e-3 * fixed_ms, 1e-3 * expert_ms, 1e-3 * row_ms
