"""One expert in onnxruntime: its own session, one thread pool for all sessions, buffers bound once.

With a session per expert, a node can hold any set of experts. It costs little: a call with bound buffers takes 4 µs on
top of the arithmetic.
"""

from pathlib import Path

import numpy as np

from edge_node.errors import ProviderError
from edge_node.experts.providers import session_providers
from wire.device_profiles import Provider
from wire.errors import BundleError
from wire.onnx_session import expert_options, open_session
from wire.tensors import Array


class ExpertSession:
    """One loaded expert. Buffers are bound again only if they or the number of tokens change."""

    def __init__(self, model: Path, hidden: int, provider: Provider = "cpu") -> None:
        """Load an expert.

        Args:
            model: path of its ONNX graph.
            hidden: the model's hidden size.
            provider: what computes.

        Raises:
            BundleError: onnxruntime can't load it.
            ProviderError: `provider` is a GPU that can't compute all of its operations.
        """
        options = expert_options()
        wanted = session_providers(provider)
        if provider != "cpu":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        try:
            self._session = open_session(model, options, wanted)
        except Exception as error:  # noqa: BLE001
            # onnxruntime raises a dozen unrelated classes for the same reason: the model can't be loaded.
            first_line = str(error).partition("\n")[0]
            kind = BundleError if provider == "cpu" else ProviderError
            raise kind(f"{model} can't be loaded by onnxruntime: {first_line}") from None
        if (got := self._session.get_providers()[0]) != wanted[0][0]:
            # If a library can't be loaded, onnxruntime only logs it and takes another provider.
            raise ProviderError(f"onnxruntime can't start {wanted[0][0]} and took {got}")
        self._hidden = hidden
        self._binding = self._session.io_binding()
        self._bound: tuple[Array, Array, int] | None = None

    def run(self, x: Array, y: Array, tokens: int) -> None:
        """Compute the first `tokens` rows of y from those of x; both are float32 [≥ tokens, hidden] and contiguous."""
        bound = self._bound
        # The arrays themselves are compared: numpy takes long to give their addresses.
        if bound is None or bound[0] is not x or bound[1] is not y or bound[2] != tokens:
            shape = (tokens, self._hidden)
            self._binding.bind_input("x", "cpu", 0, np.float32, shape, x.ctypes.data)
            self._binding.bind_output("y", "cpu", 0, np.float32, shape, y.ctypes.data)
            self._bound = (x, y, tokens)
        self._session.run_with_iobinding(self._binding)
