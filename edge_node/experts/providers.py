"""Execution providers of onnxruntime: a GPU if it proves that it computes every expert correctly, else the CPU.

A wheel may list a GPU that it has no kernels for, and sessions fall back to the CPU silently. A GPU is therefore used
only if it takes every operation of every expert and gives the expected output for the probe input.
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
"""Relative errors that are allowed on a GPU where they exceed those of CPUs: a GPU computes fp16 in fp16, and
multiplies block-quantised weights with activations that are not quantised. The latter alone makes 0.011 with the demo
model's int4 experts, as measured on a CPU with accuracy_level 0."""


class ChosenProvider(NamedTuple):
    """The provider that computes.

    Attributes:
        reason: why none of the providers before it does; empty if it was the first.
    """

    provider: Provider
    reason: str = ""


def session_providers(provider: Provider) -> list[tuple[str, dict[str, Any]]]:
    """The `providers` argument of `onnxruntime.InferenceSession`: names and options, the preferred one first."""
    return _SESSIONS[provider]


def probe_tolerance(manifest: Manifest, provider: Provider) -> float:
    """Largest relative error of a probe output that is accepted."""
    if provider == "cpu":
        return manifest.probe_tolerance
    return max(manifest.probe_tolerance, _GPU_TOLERANCE.get(manifest.quantisation.scheme, 0.0))


def unavailable(provider: Provider) -> str:
    """Why the installed onnxruntime lacks a provider, for people; empty if it has it."""
    first = _SESSIONS[provider][0][0]
    listed = ort.get_available_providers()
    return "" if first in listed else f"{provider}: this onnxruntime has no {first} (only {', '.join(listed)})"


def first_that_proves(providers: Sequence[Provider], load: Callable[[Provider], _T]) -> tuple[_T, ChosenProvider]:
    """What `load` returns for the first provider with which it succeeds; the CPU is tried last.

    Args:
        providers: to try in this order.
        load: raises `ProviderError` if a provider fails.
    """
    reasons: list[str] = []
    for provider in providers:
        if provider == "cpu":
            break
        reason = unavailable(provider)
        if not reason:
            try:
                return load(provider), ChosenProvider(provider, "; ".join(reasons))
            except ProviderError as error:
                reason = f"{provider}: {error}"
        reasons.append(reason)
        log.warning("not computing with %s", reason)
    return load("cpu"), ChosenProvider("cpu", "; ".join(reasons))
