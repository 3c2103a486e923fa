"""Times of the trunk and of a unit, each measured alone, from which a step's time is predicted."""

import os
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from bs_coordinator.trunk.inputs import SequenceInput
from bs_coordinator.trunk.interface import Trunk
from edge_node.experts import ExpertRuntime
from testbed.whole_shape.arms import BATCHES, Alone
from wire.manifest import Manifest, probe_input

_ROUNDS = 7
_UNITS = 6
"""Units that take turns, so that each has left the processor's caches when its turn comes."""


def measure_alone(bundle: Path, manifest: Manifest, trunk: Trunk, *, core: int) -> Alone:
    """Measure trunk and units while nothing else runs.

    Args:
        core: the core on which units are computed.
    """
    most = BATCHES[-1]
    one_ms, most_ms = _trunk_ms(trunk, 1), _trunk_ms(trunk, most)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        unit_one_ms, unit_most_ms = _unit_ms(bundle, manifest, most)
    finally:
        os.sched_setaffinity(0, before)
    return Alone(
        one_ms, max(0.0, (most_ms - one_ms) / (most - 1)), unit_one_ms,
        max(0.0, (unit_most_ms - unit_one_ms) / (most - 1)),
    )  # fmt: skip


@torch.inference_mode()
def _trunk_ms(trunk: Trunk, sequences: int) -> float:
    """Median time of a step of so many sequences, without experts."""
    caches = [trunk.new_cache() for _ in range(sequences)]
    times_ms = []
    for turn in range(_ROUNDS):
        began = time.perf_counter_ns()
        trunk_pass = trunk.start_pass([SequenceInput([7 + turn], cache) for cache in caches])
        output = None
        for layer in range(trunk.layers):
            hidden, _ = trunk_pass.attend(layer)
            if output is None:
                output = np.zeros_like(hidden)
            trunk_pass.add(output)
        trunk_pass.logits(False)
        times_ms.append((time.perf_counter_ns() - began) / 1e6)
    return statistics.median(times_ms[2:])


def _unit_ms(bundle: Path, manifest: Manifest, most: int) -> tuple[float, float]:
    """Median times of one row, and of `most`, through a unit."""
    runtime = ExpertRuntime(bundle, manifest, [entry.id for entry in manifest.experts[:_UNITS]], threads=1)
    times_ms: dict[int, list[float]] = {1: [], most: []}
    for _ in range(_ROUNDS):
        for rows, found in times_ms.items():
            x = probe_input(manifest.dims.hidden, rows)
            for id in runtime.ids:
                began = time.perf_counter_ns()
                runtime.run(id, x)
                found.append((time.perf_counter_ns() - began) / 1e6)
    return statistics.median(times_ms[1][len(runtime.ids) :]), statistics.median(times_ms[most][len(runtime.ids) :])
