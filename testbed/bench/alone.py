"""Times of the parts of a decode step, each measured alone: trunk, head, experts."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bs_coordinator.trunk.inputs import SequenceInput
from bs_coordinator.trunk.interface import Trunk
from edge_node.experts import ExpertRuntime
from testbed.bench.floor import Alone
from wire.experts import ExpertId
from wire.manifest import load_manifest
from wire.probe import probe_input

_ROUNDS = 12


class Parts:
    """Runs the parts in this process. Call `measure` between the measurements that they are compared with.

    Args:
        bundle: bundle of the experts.
        trunk: trunk to measure.
        past_tokens: length of the context.
    """

    def __init__(self, bundle: Path, trunk: Trunk, *, past_tokens: int) -> None:
        manifest = load_manifest(bundle)
        self._trunk = trunk
        self._cache = trunk.new_cache()
        self._past = past_tokens
        # Expert 0 of all layers: each has left the CPU caches when its turn comes, as in decoding.
        ids = [entry.id for entry in manifest.experts if entry.expert == 0]
        self._runtime = ExpertRuntime(bundle, manifest, ids, threads=1)
        self._x = probe_input(manifest.dims.hidden)
        self._output = np.zeros((1, manifest.dims.hidden), np.float32)
        self.trunk_ms: list[float] = []
        self.head_ms: list[float] = []
        self.expert_ms: list[float] = []

    def measure(self) -> None:
        """Run a few rounds of each part."""
        with torch.inference_mode():
            if not self._cache.get_seq_length():
                self._prefill()
            for _ in range(_ROUNDS):
                self._token()
        ids = self._runtime.ids
        for _ in range(_ROUNDS):
            began = time.perf_counter_ns()
            for id in ids:
                self._expert(id)
            self.expert_ms.append((time.perf_counter_ns() - began) / 1e6 / len(ids))

    def alone(self) -> Alone:
        """Medians over all rounds so far."""
        expert_ms = statistics.median(self.expert_ms)
        compute: Callable[[int], float] = lambda experts: experts * expert_ms  # noqa: E731
        return Alone(statistics.median(self.trunk_ms), statistics.median(self.head_ms), compute)

    def _prefill(self) -> None:
        trunk_pass = self._trunk.start_pass([SequenceInput(list(range(self._past)), self._cache)])
        output = np.zeros((self._past, self._output.shape[1]), np.float32)
        for layer in range(self._trunk.layers):
            trunk_pass.attend(layer)
            trunk_pass.add(output)
        trunk_pass.logits(False)

    def _token(self) -> None:
        mark = self._trunk.mark(self._cache)
        began = time.perf_counter_ns()
        trunk_pass = self._trunk.start_pass([SequenceInput([7], self._cache)])
        embedded = time.perf_counter_ns()
        for layer in range(self._trunk.layers):
            trunk_pass.attend(layer)
            trunk_pass.add(self._output)
        attended = time.perf_counter_ns()
        trunk_pass.logits(False)
        end = time.perf_counter_ns()
        self.trunk_ms.append((attended - embedded) / 1e6)
        self.head_ms.append((embedded - began + end - attended) / 1e6)
        self._trunk.restore(self._cache, mark)

    def _expert(self, id: ExpertId) -> None:
        np.multiply(self._runtime.run(id, self._x), np.float32(0.5))
