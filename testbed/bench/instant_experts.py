"""Experts that take no time."""

import numpy as np

from bs_coordinator.engine.experts import ExpertOutput, Ready
from bs_coordinator.selection.forecast import LayerForecast
from wire.tensors import Array


class InstantExperts:
    """`bs_coordinator.engine.experts.Experts` that return zeros immediately."""

    def __init__(self, experts: int, hidden: int) -> None:
        self._forecast = LayerForecast.even(0, experts)
        self._hidden = hidden
        self._answers: dict[int, Ready] = {}

    def begin(self, layer: int, hidden: Array, gate: Array) -> Ready:
        tokens = len(hidden)
        if tokens not in self._answers:
            self._answers[tokens] = Ready(ExpertOutput(np.zeros((tokens, self._hidden), np.float32)))
        return self._answers[tokens]

    def forecast(self, layer: int) -> LayerForecast:
        return self._forecast
