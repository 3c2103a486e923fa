"""One expert in onnxruntime: a session of its own, one shared thread pool, buffers bound once.

A session per expert is what lets a node hold any set of them, and costs nothing: a call with bound buffers
takes 4 µs on top of the arithmetic.
"""

from pathlib import Path

import numpy as np
import onnxruntime as ort

from edge_node.errors import ProviderError
from edge_node.experts.providers import session_providers
from wire.device_profiles import Provider
from wire.errors import BundleError
from wire.manifest import EXACT_SUMS
from wire.tensors import Array

_shared_pool_threads: int | None = None


def share_thread_pool(threads: int) -> None:
    """Give all sessions of this process one pool. The first call decides: onnxruntime allows only one.

    A single thread needs none, and without one other code in this process may use sessions as it likes.
    """
    global _shared_pool_threads
    if _shared_pool_threads is None and threads > 1:
        ort.set_global_thread_pool_sizes(threads, 1)
        _shared_pool_threads = threads


class ExpertSession:
    """One loaded expert; its buffers are bound again only when they or the token count change."""

    def __init__(self, model: Path, hidden: int, provider: Provider = "cpu") -> None:
        """Load it.

        Raises:
            BundleError: onnxruntime can't.
            ProviderError: the GPU that was asked for can't take all of its operations.
        """
        options = ort.SessionOptions()
        options.use_per_session_threads = _shared_pool_threads is None
        options.intra_op_num_threads = 0 if _shared_pool_threads else 1
        # Activations are one small buffer: an arena per session would only keep memory.
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        options.log_severity_level = 3
        options.add_session_config_entry(*EXACT_SUMS)
        wanted = session_providers(provider)
        if provider != "cpu":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        try:
            self._session = ort.InferenceSession(model, options, providers=wanted)
        except Exception as error:  # noqa: BLE001
            # onnxruntime raises a dozen unrelated classes, all for the same reason: not a loadable model.
            first_line = str(error).partition("\n")[0]
            kind = BundleError if provider == "cpu" else ProviderError
            raise kind(f"{model} can't be loaded by onnxruntime: {first_line}") from None
        if (got := self._session.get_providers()[0]) != wanted[0][0]:
            # A library that can't be loaded is only a line in onnxruntime's log.
            raise ProviderError(f"onnxruntime can't start {wanted[0][0]} and took {got}")
        self._hidden = hidden
        self._binding = self._session.io_binding()
        self._bound = (0, 0, 0)

    def run(self, x: Array, y: Array, tokens: int) -> None:
        """The first `tokens` rows of y from those of x, both float32 [≥ tokens, hidden], contiguous."""
        key = (x.ctypes.data, y.ctypes.data, tokens)
        if key != self._bound:
            shape = (tokens, self._hidden)
            self._binding.bind_input("x", "cpu", 0, np.float32, shape, key[0])
            self._binding.bind_output("y", "cpu", 0, np.float32, shape, key[1])
            self._bound = key
        self._session.run_with_iobinding(self._binding)
