"""A dense draft model as one quantised ONNX graph (`wdmoe-export draft`): a few milliseconds per token."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bs_coordinator.engine.speculation.model_drafter import Choice, ModelDrafter
from common.cores import usable_cores
from wire.draft import DraftManifest, load_draft
from wire.errors import BundleError
from wire.onnx_session import open_session, session_options

_FIRST_CAPACITY = 256
_FEW_CORES, _MOST_THREADS = 4, 8
"""Use all of few cores and half of many: the others are busy, or are hyperthreads. A draft token of the demo's draft
model takes 5.1 ms with four threads, 4.2 ms with six and 4.0 ms with eight on a machine with 16 cores."""


class DraftGraph:
    """The model's weights, shared by all sequences."""

    def __init__(self, folder: Path) -> None:
        """Check and load a draft model.

        Args:
            folder: made by `wdmoe-export draft`.

        Raises:
            BundleError: there is no draft model in the folder, or it is damaged.
        """
        self.manifest: DraftManifest = load_draft(folder)
        cores = usable_cores()
        threads = min(cores, max(_FEW_CORES, cores // 2), _MOST_THREADS)
        options = session_options(threads)
        # A draft consists of hundreds of matrix products of about 10 µs each: threads that sleep between them make it a
        # third slower. Between drafts they must not spin, because the trunk (and local nodes) need the cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        path = folder / self.manifest.files[0].path
        try:
            self.session = open_session(path, options)
        except Exception as error:  # noqa: BLE001
            # onnxruntime raises a dozen unrelated exception classes for a model that can't be loaded.
            raise BundleError(f"{path} can't be loaded: {str(error).partition(chr(10))[0]}") from None
        # Reads one text at a time, during the steps of the model that it drafts for.
        self._background = ThreadPoolExecutor(1, thread_name_prefix="draft")
        self._spare_cores = threads <= cores // 2

    def drafter(self) -> ModelDrafter:
        """A drafter for one sequence."""
        return ModelDrafter(_GraphReader(self), background=self._background, spare_cores=self._spare_cores)


class _GraphReader:
    """The model and one sequence's buffers, bound once; implements `Reader`.

    `exporter.draft.draft_graph` defines the graph's inputs and outputs.
    """

    def __init__(self, graph: DraftGraph) -> None:
        self.max_positions: int = graph.manifest.max_positions
        self._session = graph.session
        self._binding = graph.session.io_binding()
        self._length, self._total = np.zeros(1, np.int32), np.zeros((), np.int32)
        self._id, self._probability = np.zeros(1, np.int64), np.zeros(1, np.float32)
        inputs: dict[str, Any] = {"length": self._length, "total": self._total}
        outputs: dict[str, Any] = {"id": self._id, "probability": self._probability}
        # Draft models made by earlier versions name the most probable token only.
        if choices := {out.name: out.shape for out in graph.session.get_outputs()}.get("next_ids"):
            self._id, self._probability = np.zeros(choices, np.int64), np.zeros(choices, np.float32)
            outputs = {"next_ids": self._id, "next_probabilities": self._probability}
        for name, array in inputs.items():
            self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        shape = graph.manifest
        self._cache = np.zeros((2 * shape.layers, 1, shape.kv_heads, 0, shape.head_dim), np.float32)

    def read(self, ids: Sequence[int], past: int) -> list[Choice]:
        total = past + len(ids)
        self._reserve(total)
        pending = np.array([ids], np.int64)
        self._length[0], self._total[...] = total - 1, total
        self._binding.bind_input("ids", "cpu", 0, np.int64, pending.shape, pending.ctypes.data)
        self._session.run_with_iobinding(self._binding)
        pairs = zip(self._id.ravel().tolist(), self._probability.ravel().tolist(), strict=True)
        return [Choice(id, probability) for id, probability in pairs]

    def _reserve(self, tokens: int) -> None:
        held = self._cache.shape[3]
        if tokens <= held:
            return
        capacity = max(_FIRST_CAPACITY, 2 * held)
        while capacity < tokens:
            capacity *= 2
        layers, one, heads, _, dim = self._cache.shape
        cache = np.zeros((layers, one, heads, capacity, dim), np.float32)
        cache[:, :, :, :held] = self._cache
        self._cache = cache
        for i, part in enumerate(cache):
            name = f"{'values' if i % 2 else 'keys'}.{i // 2}"
            self._binding.bind_input(name, "cpu", 0, np.float32, part.shape, part.ctypes.data)
            self._binding.bind_output(f"new_{name}", "cpu", 0, np.float32, part.shape, part.ctypes.data)
