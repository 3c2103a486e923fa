"""Hidden states as bytes: float32 [tokens, hidden] in each of the number formats that frames may carry.

A wire dtype is one member of `WireDtype`. Adding one means adding a member here, and its row to the table of
docs/protocol.md; options, frames and rounding on the base station follow.
"""

import enum
import math
from collections.abc import Callable
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Buffers = list[bytes | memoryview]

_LEAST_PEAK = 127 * float(np.finfo(np.float32).tiny)
"""A row whose largest magnitude is below this is encoded as zeros in int8: its scale would lose precision or be 0."""
_MOST_PRODUCT = 10_000
"""Values up to which a product is computed by one thread: waking others would take longer."""
_FP16_LIMIT = 65520.0
"""Half-way between the largest fp16 number and the next power of two: from here on values become infinite."""


class Codec(NamedTuple):
    """How one wire dtype writes and reads a tensor.

    Attributes:
        row_bytes: bytes of one token, from the hidden size.
        encode: buffers of a float32 [tokens, hidden] tensor, little-endian, row by row.
        decode: the float32 [tokens, hidden] tensor in a buffer of exactly `tokens × row_bytes(hidden)` bytes, from the
            buffer, tokens and hidden size; read-only if it is a view of the buffer.
        max_error: from a finite float32 [tokens, hidden] tensor, the largest absolute error of each value after
            encoding and decoding; infinite for values out of range.
        limit: values of this magnitude and above can't be encoded: they become infinite.
    """

    row_bytes: Callable[[int], int]
    encode: Callable[[Array], Buffers]
    decode: Callable[[memoryview, int, int], Array]
    max_error: Callable[[Array], Array]
    limit: float = math.inf


def _encode_fp32(x: Array) -> Buffers:
    return [_raw(x.astype("<f4", copy=False))]


def _decode_fp32(buffer: memoryview, tokens: int, hidden: int) -> Array:
    return np.frombuffer(buffer, "<f4").reshape(tokens, hidden)


def _encode_fp16(x: Array) -> Buffers:
    # Values beyond ±65504 become infinite, which the receiver refuses as not finite.
    with np.errstate(over="ignore"):
        return [_raw(x.astype("<f2"))]


def _decode_fp16(buffer: memoryview, tokens: int, hidden: int) -> Array:
    return np.frombuffer(buffer, "<f2").reshape(tokens, hidden).astype(np.float32)


def _max_error_fp16(x: Array) -> Array:
    """Half a unit in the last place of 11 significant bits, or of the smallest subnormal number."""
    magnitude = np.abs(x)
    return np.where(magnitude < _FP16_LIMIT, magnitude * np.float32(2**-11) + np.float32(2**-25), np.float32(np.inf))


def _encode_int8(x: Array) -> Buffers:
    # A scale per token, max|x| / 127, so that a token with large values costs the others no precision.
    peak = np.abs(x).max(axis=1, initial=0.0)
    scale = np.where(peak > _LEAST_PEAK, peak / 127.0, 1.0).astype("<f4")
    with np.errstate(invalid="ignore"):
        q = np.rint(x / scale[:, None]).astype(np.int8)
    return [_raw(scale), _raw(q)]


def _decode_int8(buffer: memoryview, tokens: int, hidden: int) -> Array:
    scale = np.frombuffer(buffer[: 4 * tokens], "<f4")
    q = np.frombuffer(buffer[4 * tokens :], np.int8).reshape(tokens, hidden)
    with np.errstate(over="ignore", invalid="ignore"):  # overflows to infinity or NaN, which the receiver refuses
        x: Array = q * scale[:, None]
    return x


def _max_error_int8(x: Array) -> Array:
    """Half a step of the token's scale, with a margin for rounding in float32."""
    peak = np.abs(x).max(axis=1, initial=0.0, keepdims=True)
    return np.broadcast_to(peak * np.float32(0.5001 / 127) + np.float32(_LEAST_PEAK), x.shape)


class WireDtype(enum.IntEnum):
    """Number format of hidden states in frames; the member's value is its code in a frame's header."""

    codec: Codec

    FP32 = 0, Codec(lambda hidden: 4 * hidden, _encode_fp32, _decode_fp32, np.zeros_like)
    FP16 = 1, Codec(lambda hidden: 2 * hidden, _encode_fp16, _decode_fp16, _max_error_fp16, _FP16_LIMIT)
    INT8 = 2, Codec(lambda hidden: 4 + hidden, _encode_int8, _decode_int8, _max_error_int8)

    def __new__(cls, code: int, codec: Codec) -> Self:
        """Make a member: an integer that carries its codec."""
        member = int.__new__(cls, code)
        member._value_ = code
        member.codec = codec
        return member

    @classmethod
    def named(cls, name: str) -> Self:
        """The member with this name, in lower case as options and plans write it.

        Raises:
            ValueError: there is none.
        """
        try:
            return cls[name.upper()]
        except KeyError:
            known = ", ".join(member.name.lower() for member in cls)
            raise ValueError(f"'{name}' is not a wire dtype: choose one of {known}") from None

    def round_trip(self, x: Array) -> Array:
        """What a receiver gets of a float32 [tokens, hidden] tensor; `x` itself if that is exact."""
        if self is WireDtype.FP32:
            return x
        return self.codec.decode(memoryview(b"".join(self.codec.encode(x))), *x.shape)


def all_finite(x: Array) -> bool:
    """Whether no value of a tensor is NaN or infinite."""
    return _norm_below(x, math.inf) or bool(np.isfinite(x).all())


def all_below(x: Array, limit: float) -> bool:
    """Whether the magnitudes of all values of a tensor are below a limit; NaN is not."""
    return _norm_below(x, 0.9 * limit) or float(np.abs(x).max(initial=0.0)) < limit


def _norm_below(x: Array, limit: float) -> bool:
    """Whether a small tensor's norm is below a limit; then all its values are, but for rounding.

    This takes less than half of the time of looking at the values one by one, and decoding waits for it.
    """
    return x.size <= _MOST_PRODUCT and float(np.vdot(x, x)) < limit * limit


def _raw(array: NDArray[np.generic]) -> memoryview:
    return (array if array.flags.c_contiguous else np.ascontiguousarray(array)).data.cast("B")
