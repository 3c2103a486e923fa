"""Streaming a matrix out of a checkpoint as float32 row slabs that stay in the processor's cache."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.checkpoint.matrices import MatrixRef
from exporter.checkpoint.safetensors_file import ITEM_BYTES, TensorReader, TensorRef
from wire.tensors import Array

Raw = NDArray[np.uint8]

# 128 Ki weights: half a megabyte as float32, so slab and scratch stay within a typical second-level cache.
SLAB_WEIGHTS = 1 << 17
# Of a transposed matrix, a piece of each input's outputs is read at once, in pieces of kilobytes.
_BAND_BYTES = 8 << 20

# Values of 4-bit codes: sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0, section 5.3.3).
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_FP4_VALUES = np.concatenate([_FP4, -_FP4])


def slab_rows(columns: int) -> int:
    """Number of rows per slab of a matrix with this many columns."""
    return max(1, SLAB_WEIGHTS // columns)


def stream_rows(reader: TensorReader, matrix: MatrixRef, hasher: Any) -> Iterator[tuple[int, Array]]:
    """Slabs (first row, float32 [rows, columns]) of a matrix, from the first row to the last.

    Values are exact, except that of FP8, whose products with their scales are rounded to float32. A slab is a view of a
    buffer that the next slab overwrites. Of a matrix with `columns`, slabs have only these. `hasher` (from hashlib) is
    updated with the raw bytes: first the scales, if there are any, then the matrix, row by row, with all columns.

    Raises:
        CheckpointError: the file could not be read to the end.
    """
    rows, columns = matrix.shape
    scales = _read_scales(reader, matrix, hasher)
    wide = np.empty((min(rows, slab_rows(columns)), columns), np.float32)
    for first, raw in _raw_slabs(reader, matrix):
        hasher.update(raw)
        slab = wide[: len(raw)]
        _widen(raw, matrix, scales, first, slab)
        yield first, slab if matrix.columns is None else np.ascontiguousarray(slab[:, slice(*matrix.columns)])


def _raw_slabs(reader: TensorReader, matrix: MatrixRef) -> Iterator[tuple[int, Raw]]:
    """First row and raw bytes [rows, bytes of a row] of each slab, contiguous."""
    rows, columns = matrix.shape
    step = min(rows, slab_rows(columns))
    if not matrix.transposed:
        buffer = np.empty((step * matrix.step, matrix.row_bytes), np.uint8)
        for first in range(0, rows, step):
            wanted = buffer[: matrix.step * min(step, rows - first)]
            yield first, _read_rows(reader, matrix.tensor, matrix, first, wanted)
        return
    item = ITEM_BYTES[matrix.tensor.dtype]
    width = max(step, min(rows, _BAND_BYTES // (columns * item * matrix.step)) // step * step)
    # Whole values, as bytes would be turned one by one.
    band = np.empty((columns, width * matrix.step), f"u{item}")
    for start in range(0, rows, width):
        count = min(width, rows - start)
        turned = _read_band(reader, matrix, start, band[:, : count * matrix.step])
        for first in range(0, count, step):
            yield start + first, np.ascontiguousarray(turned[first : first + step]).view(np.uint8)


def _read_rows(reader: TensorReader, tensor: TensorRef, matrix: MatrixRef, first: int, buffer: Raw) -> Raw:
    """The matrix's rows [rows, bytes of a row] from `first` on, out of a tensor with the matrix's rows.

    Args:
        buffer: takes the rows and those between them, uint8 [rows · step, bytes of a row].
    """
    experts_before = matrix.offset * tensor.bytes // matrix.tensor.bytes
    begin = experts_before + (matrix.first + first * matrix.step) * buffer.shape[1]
    # Nothing behind the last row is read: it may be the end of the tensor.
    wanted = buffer[: len(buffer) - matrix.step + 1]
    # Other slices read the same rows for other columns, and another matrix the rows between these.
    once = matrix.columns is None and matrix.step == 1
    reader.read_into(tensor, begin, wanted.reshape(-1).data, once=once)
    return np.ascontiguousarray(wanted[:: matrix.step])


def _read_band(reader: TensorReader, matrix: MatrixRef, first: int, band: NDArray[Any]) -> NDArray[Any]:
    """A transposed matrix's rows [rows, columns] from `first` on, as a view of integers as long as its values.

    Args:
        band: a view of a buffer, [columns, rows · step].
    """
    item = band.itemsize
    begin = matrix.offset + (matrix.first + first * matrix.step) * item
    for column in range(len(band)):
        piece = band[column, : band.shape[1] - matrix.step + 1].view(np.uint8)
        reader.read_into(matrix.tensor, begin + column * matrix.outputs * item, piece.data)
    return band[:, :: matrix.step].T


def _read_scales(reader: TensorReader, matrix: MatrixRef, hasher: Any) -> Array | None:
    """Scales float32 [blocks of rows, blocks of columns] of the matrix."""
    tensor = matrix.scales
    if tensor is None:
        return None
    high, wide = matrix.scale_block
    # The first row may lie within a block of rows, if the matrix is a part of a larger one.
    rows, columns = -(-(matrix.first % high + matrix.shape[0]) // high), -(-matrix.shape[1] // wide)
    buffer = np.empty((rows * matrix.step, columns * ITEM_BYTES[tensor.dtype]), np.uint8)
    raw = _read_rows(reader, tensor, replace(matrix, first=matrix.first // high), 0, buffer)
    hasher.update(raw)
    scales = np.empty((rows, columns), np.float32)
    if matrix.is_mxfp4:
        # An exponent of 255 is NaN by the standard; here it makes every weight of its block non-finite, too.
        with np.errstate(over="ignore"):
            np.ldexp(np.float32(1), raw.astype(np.int32) - 127, out=scales)
    else:
        _widen_floats(raw, tensor.dtype, scales)
    return scales


def _widen(raw: Raw, matrix: MatrixRef, scales: Array | None, first: int, out: Array) -> None:
    """Convert the raw bytes of the rows from `first` on to float32 in `out`."""
    if scales is None:
        _widen_floats(raw, matrix.tensor.dtype, out)
        return
    high, wide = matrix.scale_block
    if matrix.is_mxfp4:
        np.take(_FP4_PAIRS, raw, out=out.view(np.uint64), mode="clip")
    else:
        np.take(_FP8_VALUES, raw, out=out, mode="clip")
    by_row = scales[(matrix.first % high + np.arange(first, first + len(out))) // high]
    with np.errstate(invalid="ignore", over="ignore"):
        if out.shape[1] % wide:
            out *= np.repeat(by_row, wide, axis=1)[:, : out.shape[1]]
        else:
            blocks = out.reshape(len(out), -1, wide)
            blocks *= by_row[:, :, None]


def _widen_floats(raw: Raw, dtype: str, out: Array) -> None:
    """Convert the raw bytes of BF16, F16 or F32 values to float32 in `out`, without rounding."""
    flat, raw = out.reshape(-1), raw.reshape(-1)
    if dtype == "BF16":
        # bfloat16 is the upper half of a float32.
        bits = flat.view(np.uint32)
        np.copyto(bits, raw.view("<u2"))
        np.left_shift(bits, 16, out=bits)
    elif dtype == "F16":
        np.copyto(flat, raw.view("<f2"))
    else:
        np.copyto(flat, raw.view("<f4"))


def _fp4_pairs() -> NDArray[np.uint64]:
    """Both float32 values of each byte, the low half first, as one 64-bit number."""
    codes = np.arange(256)
    pairs = np.stack([_FP4_VALUES[codes & 15], _FP4_VALUES[codes >> 4]], axis=1)
    return np.ascontiguousarray(pairs, np.float32).view(np.uint64).reshape(-1)


def _fp8_values() -> Array:
    """Values of the 256 codes of E4M3 without infinities (Micikevicius et al. 2022, arXiv 2209.05433)."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    values = np.where(exponent, np.ldexp(8.0 + mantissa, exponent - 10), np.ldexp(1.0 * mantissa, -9))
    values[codes & 127 == 127] = np.nan
    return np.asarray(np.where(codes & 128, -values, values), np.float32)


_FP4_PAIRS = _fp4_pairs()
_FP8_VALUES = _fp8_values()
