"""Times of a trunk, measured alone, from which a step's time is predicted."""

import statistics
import time

import numpy as np
import torch

from bs_coordinator.placement.row_curve import RowCurve
from bs_coordinator.trunk.inputs import SequenceInput
from bs_coordinator.trunk.interface import Trunk
from testbed.whole_shape.arms import ACCEPTANCE, BATCHES

_ROUNDS = 9
_WARM_UP = 4
"""Rounds that are not kept: a GPU's first calls with a new number of rows take long."""


def trunk_by_sequences(trunk: Trunk) -> RowCurve:
    """Times in ms of a step of each of `BATCHES` sequences with a row each, without experts."""
    return RowCurve(BATCHES, tuple(_trunk_ms(trunk, sequences, 1) for sequences in BATCHES))


def trunk_by_drafts(trunk: Trunk) -> RowCurve:
    """Times in ms of a step of one sequence with as many rows as with drafts, without experts."""
    rows = (1, *sorted({1 + drafted for drafted, _ in ACCEPTANCE}))
    return RowCurve(rows, tuple(_trunk_ms(trunk, 1, count) for count in rows))


@torch.inference_mode()
def _trunk_ms(trunk: Trunk, sequences: int, rows: int) -> float:
    """Median time of a step of so many sequences with so many rows each."""
    caches = [trunk.new_cache() for _ in range(sequences)]
    wanted = list(range(rows))
    times_ms = []
    for turn in range(_ROUNDS):
        ids = [7 + turn] * rows
        began = time.perf_counter_ns()
        trunk_pass = trunk.start_pass([SequenceInput(ids, cache, rows=wanted) for cache in caches])
        output = None
        for layer in range(trunk.layers):
            hidden, _ = trunk_pass.attend(layer)
            if output is None:
                output = np.zeros_like(hidden)
            trunk_pass.add(output)
        trunk_pass.logits(False)
        times_ms.append((time.perf_counter_ns() - began) / 1e6)
    return statistics.median(times_ms[_WARM_UP:])
