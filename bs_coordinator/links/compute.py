"""How long a node takes for a request, learnt from its own account.

`fixed + experts · expert + rows · row`: each distinct expert's weights are read once, each row is computed. The
experts of one bundle are alike in size and quantisation, so that a node's experts share their costs.
"""

import math

from bs_coordinator.links.kalman import RobustFilter

_PRIOR_MS = (0.3, 0.5, 0.2)
_PRIOR_STD_MS = (0.5, 5.0, 1.0)
_FLOOR_MS = (1e-3, 1e-3, 1e-4)
_DRIFT = (0.02, 0.02, 0.02)
_FIRST_NOISE_MS = 0.2
_LEAST_NOISE_MS = 0.01
_MODEL_ERROR = 0.05
"""Relative: kernels switch with the number of rows, caches fill."""
_PLAUSIBLE_S = 600.0


class ComputeEstimator:
    """The estimate of one node's times. States in ms: (fixed, per expert, per row)."""

    __slots__ = ("_filter", "_time_s")

    def __init__(self) -> None:
        self._time_s = -math.inf
        self._filter = RobustFilter(
            _PRIOR_MS, _PRIOR_STD_MS, drift=_DRIFT, floor=_FLOOR_MS, noise=_FIRST_NOISE_MS, least_noise=_LEAST_NOISE_MS
        )

    def observe(self, time_s: float, *, experts: int, rows: int, node_s: float) -> bool:
        """Take in the node's own account of one request; False if it can't be true."""
        if not (0 < node_s < _PLAUSIBLE_S and 0 < experts < 1 << 16 and 0 < rows < 1 << 32):
            return False
        if self._time_s > -math.inf:
            self._filter.advance(time_s - self._time_s)
        self._time_s = max(self._time_s, time_s)
        filter = self._filter
        if filter.count == 0:
            filter.noise = max(_FIRST_NOISE_MS, 1e2 * node_s)
        h = (1.0, float(experts), float(rows))
        filter.update(h, 1e3 * node_s, extra_std=_MODEL_ERROR * filter.predict(h)[0])
        return True

    def predict_s(self, experts: int, rows: int) -> float:
        """The node's time for a request."""
        return 1e-3 * self._filter.predict((1.0, float(experts), float(rows)))[0]

    @property
    def samples(self) -> int:
        """How many requests the estimate stands on."""
        return self._filter.count

    @property
    def costs_s(self) -> tuple[float, float, float]:
        """Of every request (queue, decoding, encoding), of every distinct expert, of every row."""
        fixed_ms, expert_ms, row_ms = self._filter.x
        return 1e-3 * fixed_ms, 1e-3 * expert_ms, 1e-3 * row_ms
