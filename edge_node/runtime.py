"""Experts in onnxruntime: one session each, one shared thread pool, buffers bound once.

A session per expert is what lets a node hold any set of them, and costs nothing: a call with bound buffers
takes 4 µs on top of the arithmetic.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from edge_node.memory import return_freed_memory
from edge_node.prepacked import prepacked_model
from wire.errors import BundleError, ProbeError
from wire.experts import ExpertId
from wire.manifest import Manifest, decode_probe_output, probe_input, verify_file
from wire.tensors import Array

log = logging.getLogger(__name__)

_shared_pool_threads: int | None = None


def share_thread_pool(threads: int) -> None:
    """Give all sessions of this process one pool. The first call decides: onnxruntime allows only one.

    A single thread needs none, and without one other code in this process may use sessions as it likes.
    """
    global _shared_pool_threads
    if _shared_pool_threads is None and threads > 1:
        ort.set_global_thread_pool_sizes(threads, 1)
        _shared_pool_threads = threads


class ExpertRuntime:
    """Loaded experts of one bundle.

    Not thread-safe: all experts share one input and one output buffer.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        ids: Iterable[ExpertId],
        *,
        threads: int = 1,
        prepacked: Path | None = None,
    ) -> None:
        """Verify, load and prove the experts.

        Args:
            prepacked: folder of copies that are mapped instead of allocated (`edge_node.prepacked`).

        Raises:
            BundleError: a file is missing, changed, or no valid model.
            StorageError: no prepacked copy can be kept.
            ProbeError: an expert's output differs from the one recorded at export.
        """
        share_thread_pool(threads)
        self.manifest = manifest
        self._hidden = manifest.dims.hidden
        self._experts: dict[ExpertId, _BoundExpert] = {}
        self._x = np.zeros((0, self._hidden), np.float32)
        self._y = np.zeros((0, self._hidden), np.float32)
        self._reserve(1)
        entries = manifest.entries(ids)
        expected_input = probe_input(self._hidden)
        for entry in entries:
            for file in entry.files:
                verify_file(bundle, file)
            model = prepacked_model(bundle, entry, prepacked) if prepacked else bundle / entry.files[0].path
            self._experts[entry.id] = _BoundExpert(model, self._hidden)
            output = self.run(entry.id, expected_input)[0]
            self._prove(entry.id, output, decode_probe_output(entry.probe_output, self._hidden))
            return_freed_memory()

    @property
    def ids(self) -> Sequence[ExpertId]:
        """Loaded experts, in loading order."""
        return tuple(self._experts)

    def __contains__(self, id: ExpertId) -> bool:
        return id in self._experts

    def run(self, id: ExpertId, x: Array) -> Array:
        """The expert's output, float32 [tokens, hidden], for `x` of the same shape.

        The result is a view that the next call overwrites.

        Raises:
            KeyError: the expert is not loaded.
        """
        expert = self._experts[id]
        n = len(x)
        if n > len(self._x):
            self._reserve(n)
        self._x[:n] = x
        expert.run(self._x, self._y, n)
        return self._y[:n]

    def _reserve(self, tokens: int) -> None:
        self._x = np.zeros((tokens, self._hidden), np.float32)
        self._y = np.zeros((tokens, self._hidden), np.float32)

    def _prove(self, id: ExpertId, output: Array, expected: Array) -> None:
        norm = float(np.linalg.norm(expected))
        error = float(np.linalg.norm(output - expected)) / norm if norm else float(np.abs(output).max())
        # fp16 storage of the expected output alone can cost half a unit in the last place.
        tolerance = self.manifest.probe_tolerance + 2.0**-11
        if not error <= tolerance:  # also when error is NaN
            raise ProbeError(
                f"expert {id} computes something else here than where it was exported: relative error "
                f"{error:.2g} on the probe input, {tolerance:.2g} allowed; try another --quant for this CPU"
            )


class _BoundExpert:
    """One session with its buffers bound; rebinds only when buffers or token count change."""

    def __init__(self, model: Path, hidden: int) -> None:
        options = ort.SessionOptions()
        options.use_per_session_threads = _shared_pool_threads is None
        options.intra_op_num_threads = 0 if _shared_pool_threads else 1
        # Activations are one small buffer: an arena per session would only keep memory.
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001
            # onnxruntime raises a dozen unrelated classes, all for the same reason: not a loadable model.
            first_line = str(error).partition("\n")[0]
            raise BundleError(f"{model} can't be loaded by onnxruntime: {first_line}") from None
        self._hidden = hidden
        self._binding = self._session.io_binding()
        self._bound = (0, 0, 0)

    def run(self, x: Array, y: Array, tokens: int) -> None:
        key = (x.ctypes.data, y.ctypes.data, tokens)
        if key != self._bound:
            shape = (tokens, self._hidden)
            self._binding.bind_input("x", "cpu", 0, np.float32, shape, key[0])
            self._binding.bind_output("y", "cpu", 0, np.float32, shape, key[1])
            self._bound = key
        self._session.run_with_iobinding(self._binding)
