"""Token tensors as bytes: [tokens, hidden] in fp32, fp16 or int8 with one fp32 scale per token.

int8 is symmetric: scale = max|x| / 127 per token, so that one loud token can't blur its batch-mates.
"""

import enum

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


class WireDtype(enum.IntEnum):
    """How hidden states travel."""

    FP32 = 0
    FP16 = 1
    INT8 = 2

    @classmethod
    def named(cls, name: str) -> "WireDtype":
        """The member called `name` (`fp32`, `fp16`, `int8`)."""
        return cls[name.upper()]


_LEAST_PEAK = 127 * float(np.finfo(np.float32).tiny)
"""Below it a scale would lose its precision, or become zero; such a row travels as zeros."""
_ITEM_BYTES = {WireDtype.FP32: 4, WireDtype.FP16: 2, WireDtype.INT8: 1}


def encoded_bytes(tokens: int, hidden: int, dtype: WireDtype) -> int:
    """Bytes that `encode` makes of a [tokens, hidden] tensor."""
    scales = 4 * tokens if dtype is WireDtype.INT8 else 0
    return tokens * hidden * _ITEM_BYTES[dtype] + scales


def encode(x: Array, dtype: WireDtype) -> list[bytes | memoryview]:
    """Buffers that hold a float32 [tokens, hidden] tensor, little-endian, row by row.

    A value beyond fp16's ±65504 becomes ±inf, which the receiver refuses as non-finite.
    """
    if dtype is WireDtype.FP32:
        return [_raw(x.astype("<f4", copy=False))]
    if dtype is WireDtype.FP16:
        with np.errstate(over="ignore"):
            return [_raw(x.astype("<f2"))]
    peak = np.abs(x).max(axis=1, initial=0.0)
    scale = np.where(peak > _LEAST_PEAK, peak / 127.0, 1.0).astype("<f4")
    with np.errstate(invalid="ignore"):
        q = np.rint(x / scale[:, None]).astype(np.int8)
    return [_raw(scale), _raw(q)]


def decode(buffer: memoryview, tokens: int, hidden: int, dtype: WireDtype) -> Array:
    """The float32 [tokens, hidden] tensor in a buffer of exactly `encoded_bytes(...)` bytes.

    fp32 comes back as a read-only view of `buffer`; the others as new arrays.
    """
    if dtype is WireDtype.FP32:
        return np.frombuffer(buffer, "<f4").reshape(tokens, hidden)
    if dtype is WireDtype.FP16:
        return np.frombuffer(buffer, "<f2").reshape(tokens, hidden).astype(np.float32)
    scale = np.frombuffer(buffer[: 4 * tokens], "<f4")
    q = np.frombuffer(buffer[4 * tokens :], np.int8).reshape(tokens, hidden)
    with np.errstate(over="ignore", invalid="ignore"):  # to infinity or no number, which is refused as such
        x: Array = q * scale[:, None]
    return x


def _raw(array: NDArray[np.generic]) -> memoryview:
    return np.ascontiguousarray(array).data.cast("B")
