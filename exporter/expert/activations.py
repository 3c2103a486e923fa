"""What an expert does between its products, in numpy float32: the reference with which exported graphs are compared."""

import math

import numpy as np

from wire.manifest import ExpertGraph
from wire.tensors import Array

_HALF = np.float32(0.5)


def gated(expert: ExpertGraph, gate: Array, up: Array) -> Array:
    """The input of w2, float32 [tokens, intermediate], from the outputs of w1 and w3 of the same shape."""
    match expert.activation:
        case "silu":
            return silu(gate) * up
        case "gelu":
            return gelu(gate) * up
        case "gelu-tanh":
            return gelu_tanh(gate) * up
        case "clamped":
            alpha, limit = np.float32(expert.alpha or 0), np.float32(expert.limit or 0)
            gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
            return np.asarray(gate * sigmoid(alpha * gate) * (up + np.float32(1)), np.float32)


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(−x)) without overflow."""
    # tanh saturates where exp would overflow.
    return np.asarray(_HALF * np.tanh(_HALF * x) + _HALF, np.float32)


def silu(x: Array) -> Array:
    """x · sigmoid(x) without overflow."""
    return np.asarray(x * sigmoid(x), np.float32)


def gelu(x: Array) -> Array:
    """x · (1 + erf(x / √2)) / 2 (Hendrycks and Gimpel 2016, arXiv 1606.08415)."""
    erf = np.vectorize(math.erf, otypes=[np.float32])
    return np.asarray(_HALF * x * (np.float32(1) + erf(x * np.float32(math.sqrt(0.5)))), np.float32)


def gelu_tanh(x: Array) -> Array:
    """x · (1 + tanh(√(2/π) · (x + 0.044715 x³))) / 2, the same paper's approximation."""
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
    return np.asarray(_HALF * x * (np.float32(1) + np.tanh(inner)), np.float32)
