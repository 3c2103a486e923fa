"""Streaming a matrix out of a checkpoint as float32 row slabs that stay in the processor's cache."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.checkpoint.safetensors_file import ITEM_BYTES, TensorReader, TensorRef
from wire.tensors import Array

# 128 Ki weights: half a megabyte as float32, so slab and scratch stay within a typical second-level cache.
SLAB_WEIGHTS = 1 << 17


def slab_rows(columns: int) -> int:
    """Number of rows per slab of a matrix with this many columns."""
    return max(1, SLAB_WEIGHTS // columns)


def stream_rows(reader: TensorReader, tensor: TensorRef, hasher: Any) -> Iterator[tuple[int, Array]]:
    """Slabs (first row, float32 [rows, columns]) of a matrix, from the first row to the last.

    A slab is a view of a buffer that the next slab overwrites. `hasher` (from hashlib) is updated with the raw bytes.

    Raises:
        CheckpointError: the file could not be read to the end.
    """
    rows, columns = tensor.shape
    step = min(rows, slab_rows(columns))
    item = ITEM_BYTES[tensor.dtype]
    raw = np.empty(step * columns * item, np.uint8)
    wide = np.empty((step, columns), np.float32)
    view = raw.data
    for first in range(0, rows, step):
        count = min(step, rows - first)
        size = count * columns * item
        reader.read_into(tensor, first * columns * item, view[:size])
        hasher.update(view[:size])
        slab = wide[:count]
        widen(raw[:size], tensor.dtype, slab)
        yield first, slab


def widen(raw: NDArray[np.uint8], dtype: str, out: Array) -> None:
    """Convert the raw bytes of BF16, F16 or F32 values to float32 in `out`, without rounding."""
    flat = out.reshape(-1)
    if dtype == "BF16":
        # bfloat16 is the upper half of a float32.
        bits = flat.view(np.uint32)
        np.copyto(bits, raw.view("<u2"))
        np.left_shift(bits, 16, out=bits)
    elif dtype == "F16":
        np.copyto(flat, raw.view("<f2"))
    else:
        np.copyto(flat, raw.view("<f4"))
