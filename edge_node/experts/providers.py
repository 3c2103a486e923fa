"""What onnxruntime computes with: a GPU where it proves that it can, else the CPU, and why.

A wheel may list a GPU that it has no kernels for, and a session falls back to the CPU without a word. So a GPU counts
only if it takes every operation of every expert and gives the probe's expected output on a real inference.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import onnxruntime as ort

from edge_node.errors import ProviderError
from wire.device_profiles import Provider
from wire.manifest import Manifest, Scheme

log = logging.getLogger(__name__)

_T = TypeVar("_T")

# TF32 would round the inputs of fp32 products to 10 bits.
_CUDA: tuple[str, dict[str, Any]] = ("CUDAExecutionProvider", {"use_tf32": "0"})
_SESSIONS: dict[Provider, list[tuple[str, dict[str, Any]]]] = {
    "cpu": [("CPUExecutionProvider", {})],
    "cuda": [_CUDA],
    "tensorrt": [("TensorrtExecutionProvider", {}), _CUDA],  # what it can't build goes to CUDA
}
_GPU_TOLERANCE: dict[Scheme, float] = {"fp16": 5e-3, "int4": 0.03, "int8": 0.03}
"""Where a GPU may differ more than another CPU: it computes fp16 in fp16, and block-quantised weights with activations
that are not quantised. On the demo model's int4 experts that alone is 0.011, on a CPU with accuracy_level 0."""


class Chosen(NamedTuple):
    """What computes.

    Attributes:
        reason: why not what was asked for; empty if it is.
    """

    provider: Provider
    reason: str = ""


def session_providers(provider: Provider) -> list[tuple[str, dict[str, Any]]]:
    """As `onnxruntime.InferenceSession` takes them."""
    return _SESSIONS[provider]


def probe_tolerance(manifest: Manifest, provider: Provider) -> float:
    """Largest relative error of a probe's output."""
    if provider == "cpu":
        return manifest.probe_tolerance
    return max(manifest.probe_tolerance, _GPU_TOLERANCE.get(manifest.quantisation.scheme, 0.0))


def unavailable(provider: Provider) -> str:
    """Why the installed onnxruntime can't even try; empty if it can."""
    first = _SESSIONS[provider][0][0]
    listed = ort.get_available_providers()
    return "" if first in listed else f"{provider}: this onnxruntime has no {first} (only {', '.join(listed)})"


def first_that_proves(providers: Sequence[Provider], load: Callable[[Provider], _T]) -> tuple[_T, Chosen]:
    """What `load` makes with the first provider that it can be made with; the CPU is tried last.

    Args:
        load: raises `ProviderError` where a provider does not do.
    """
    reasons: list[str] = []
    for provider in providers:
        if provider == "cpu":
            break
        reason = unavailable(provider)
        if not reason:
            try:
                return load(provider), Chosen(provider, "; ".join(reasons))
            except ProviderError as error:
                reason = f"{provider}: {error}"
        reasons.append(reason)
        log.warning("not computing with %s", reason)
    return load("cpu"), Chosen("cpu", "; ".join(reasons))
