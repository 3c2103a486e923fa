"""Encodes float32 weights as the stored tensors of each quantisation scheme. Pure numpy, no files, no graphs.

A matrix is [rows, columns] = [outputs, inputs], as checkpoints store it. Encoders take row slabs in order and work in
preallocated buffers, so that a slab stays in the processor's cache.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from exporter.checkpoint.slabs import slab_rows
from wire.manifest import Quantisation
from wire.tensors import Array

Stored = NDArray[Any]

FP16_MAX = 65504.0
BITS = {"int4": 4, "int8": 8}
"""Bits of a code, by blockwise scheme."""


@dataclass(frozen=True)
class StoredPart:
    """One stored tensor of a matrix.

    Attributes:
        suffix: distinguishes the parts of one matrix (`weight`, `scales`, `zero_points`).
    """

    suffix: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class Encoder(Protocol):
    """Turns the row slabs of one matrix into the bytes of its parts (`matrix_parts`)."""

    def encode(self, rows: Array) -> Stored:
        """Values that these rows add to the first part, as a view that is valid until the next call.

        Raises:
            ValueError: a value can't be stored in this scheme.
        """
        ...

    def finish(self) -> list[Stored]:
        """The remaining parts, in order, after all rows have been encoded."""
        ...


def matrix_parts(quantisation: Quantisation, rows: int, columns: int) -> tuple[StoredPart, ...]:
    """The stored tensors of a [rows, columns] matrix in a scheme, in the order in which the encoder returns them."""
    u8, f4 = np.dtype(np.uint8), np.dtype("<f4")
    match quantisation.scheme:
        case "int4" | "int8":
            bits = BITS[quantisation.scheme]
            blocks = -(-columns // quantisation.block)
            parts: tuple[StoredPart, ...] = (
                StoredPart("weight", u8, (rows, blocks, quantisation.block * bits // 8)),
                StoredPart("scales", f4, (rows * blocks,)),
            )
            if not quantisation.symmetric:
                parts += (StoredPart("zero_points", u8, (rows * _zero_bytes(blocks, bits),)),)
            return parts
        case "int8-dynamic":
            return StoredPart("weight", np.dtype(np.int8), (columns, rows)), StoredPart("scales", f4, (rows,))
        case "fp16":
            return (StoredPart("weight", np.dtype("<f2"), (rows, columns)),)
        case "fp32":
            return (StoredPart("weight", f4, (rows, columns)),)


def make_encoder(quantisation: Quantisation, rows: int, columns: int) -> Encoder:
    """The encoder of a scheme for one [rows, columns] matrix."""
    if quantisation.scheme in ("int4", "int8"):
        bits = BITS[quantisation.scheme]
        return BlockEncoder(rows, columns, bits, quantisation.block, quantisation.symmetric)
    if quantisation.scheme == "int8-dynamic":
        return ChannelEncoder(rows, columns)
    return PlainEncoder("<f2" if quantisation.scheme == "fp16" else "<f4")


class PlainEncoder:
    """Weights without quantisation, in fp16 or fp32, [rows, columns]."""

    def __init__(self, dtype: DTypeLike) -> None:
        self._dtype = np.dtype(dtype)

    def encode(self, rows: Array) -> Stored:
        """Encode the next rows, float32 [rows, columns]; returns the values to append to the first part."""
        dtype = self._dtype
        if dtype.itemsize == 2 and (peak := float(np.abs(rows).max(initial=0.0))) > FP16_MAX:
            raise ValueError(f"value {peak:.6g} does not fit into fp16")
        return rows.astype(dtype, copy=False)

    def finish(self) -> list[Stored]:
        """The remaining parts, in order."""
        return []


class ChannelEncoder:
    """Symmetric int8 with one scale per output channel, stored [columns, rows] as MatMulInteger needs it.

    The range is ±127, without −128, so that a channel and its negative get the same codes up to the sign. The whole
    transposed matrix (one byte per weight) is kept until `finish`.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self._transposed = np.empty((columns, rows), np.int8)
        self._scales = np.empty(rows, np.float32)
        self._scratch = np.empty((min(rows, slab_rows(columns)), columns), np.float32)
        self._done = 0

    def encode(self, rows: Array) -> Stored:
        """Encode the next rows, float32 [rows, columns]; returns the values to append to the first part."""
        count = len(rows)
        scratch = _scratch(self._scratch, count)
        peak = np.maximum(rows.max(axis=1), -rows.min(axis=1))
        scales = peak / np.float32(127)
        where = slice(self._done, self._done + count)
        self._scales[where] = np.where(scales > 0, scales, np.float32(1))
        np.divide(rows, self._scales[where, None], out=scratch)
        np.rint(scratch, out=scratch)
        # A scale that underflowed to a denormal can push the quotient past the range.
        np.clip(scratch, -127, 127, out=scratch)
        self._transposed[:, where] = scratch.T
        self._done += count
        return self._transposed[:0]

    def finish(self) -> list[Stored]:
        """The remaining parts, in order."""
        return [self._transposed, self._scales]


class BlockEncoder:
    """4- or 8-bit codes with one scale, and a zero point unless symmetric, per block of columns.

    The layout and arithmetic are those of onnxruntime's MatMulNBits: value = (code − zero point) · scale,
    blocks run along the columns, the last one padded; two 4-bit codes share a byte, the even one low.
    """

    def __init__(self, rows: int, columns: int, bits: int, block: int, symmetric: bool) -> None:
        self._bits, self._block, self._symmetric = bits, block, symmetric
        self._columns = columns
        self._blocks = blocks = -(-columns // block)
        self._scales = np.empty((rows, blocks), np.float32)
        self._zeros = np.zeros((rows, _zero_bytes(blocks, bits)), np.uint8)
        self._done = 0
        step = min(rows, slab_rows(columns))
        # The padding stays zero: no row is copied there.
        self._padded = np.zeros((step, blocks * block), np.float32) if columns % block else None
        self._turned = np.empty(step * blocks * block, np.float32)
        self._codes = np.empty(step * blocks * block, np.uint8)
        self._packed = np.empty(step * blocks * block // 2, np.uint8)

    def encode(self, rows: Array) -> Stored:
        """Encode the next rows, float32 [rows, columns]; returns the values to append to the first part."""
        count, where = len(rows), slice(self._done, self._done + len(rows))
        self._done += count
        if self._padded is not None:
            padded = _scratch(self._padded, count)
            padded[:, : self._columns] = rows
            rows = padded
        blocks = rows.reshape(count * self._blocks, self._block)
        scale, zero = self._ranges(blocks)
        self._scales[where] = scale.reshape(count, self._blocks)
        if not self._symmetric:
            self._store_zeros(zero.reshape(count, self._blocks), where)
        codes = self._quantise(blocks, scale, zero)
        return codes if self._bits == 8 else self._pack(codes)

    def finish(self) -> list[Stored]:
        """The remaining parts, in order."""
        return [self._scales] if self._symmetric else [self._scales, self._zeros]

    def _ranges(self, blocks: Array) -> tuple[Array, Array]:
        """Scales and zero points, both float32 [blocks], of [blocks, block] weights."""
        # numpy reduces short rows one by one, which takes ten times as long as with the transpose. Neighbours are moved
        # in pairs, because copying takes as long for 8 bytes as for 4.
        pairs = self._turned[: blocks.size].view(np.uint64).reshape(self._block // 2, len(blocks))
        np.copyto(pairs, blocks.view(np.uint64).T)
        turned = pairs.view(np.float32)
        lows, highs = turned.min(axis=0), turned.max(axis=0)
        low, high = np.minimum(lows[::2], lows[1::2]), np.maximum(highs[::2], highs[1::2])
        top, middle = np.float32(2**self._bits - 1), np.float32(2 ** (self._bits - 1))
        if self._symmetric:
            # The larger end maps to code 0, which is one step farther from the middle than the highest code.
            return np.where(high > -low, high, low) / -middle, np.full(len(blocks), middle)
        np.minimum(low, 0, out=low)
        np.maximum(high, 0, out=high)
        scale = (high - low) / top
        zero = np.floor(np.divide(-low, scale, out=np.zeros_like(low), where=scale > 0) + np.float32(0.5))
        return scale, np.clip(zero, 0, top)

    def _quantise(self, blocks: Array, scale: Array, zero: Array) -> NDArray[np.uint8]:
        """Codes uint8 [blocks, block]."""
        # If a scale is too small to be inverted, its weights are practically zero.
        with np.errstate(over="ignore"):
            inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
        inverse[np.isinf(inverse)] = 0
        values = self._turned[: blocks.size].reshape(blocks.shape)
        np.multiply(blocks, inverse[:, None], out=values)
        # With half added, the truncation of the cast below rounds.
        np.add(values, (zero + np.float32(0.5))[:, None], out=values)
        np.clip(values, 0, 2**self._bits - 1, out=values)
        codes = self._codes[: blocks.size].reshape(blocks.shape)
        np.copyto(codes, values, casting="unsafe")
        return codes

    def _pack(self, codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Pairs of neighbouring 4-bit codes packed into bytes."""
        pairs = codes.reshape(-1).view("<u2")
        packed = self._packed[: len(pairs)]
        np.copyto(packed, np.bitwise_or(pairs, pairs >> 4), casting="unsafe")
        return packed

    def _store_zeros(self, zero: Array, where: slice) -> None:
        codes = zero.astype(np.uint8)
        if self._bits == 8:
            self._zeros[where] = codes
            return
        self._zeros[where] = codes[:, 0::2]
        self._zeros[where, : self._blocks // 2] |= codes[:, 1::2] << 4
        if self._blocks % 2:
            # No block is there; onnxruntime's quantiser writes the middle.
            self._zeros[where, -1] |= 0x80


def _zero_bytes(blocks: int, bits: int) -> int:
    """Bytes of one row's zero points: codes are packed, each row starts a new byte."""
    return -(-blocks * bits // 8)


def _scratch(buffer: Array, count: int) -> Array:
    """The first `count` rows of a scratch buffer; slabs larger than planned are a mistake of the caller."""
    if count > len(buffer):
        raise ValueError(f"slab of {count} rows, at most {len(buffer)} expected")
    return buffer[:count]
