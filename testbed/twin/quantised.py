"""Random weights in llama.cpp's quantised formats. Pure.

A row of weights is a series of blocks, each with scales and codes. Here codes are drawn evenly, and scales such that
outputs are about as large as inputs: finite, and no two tensors alike.
"""

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

_BLOCKS = {
    GGMLQuantizationType.Q4_0: np.dtype([("scale", "<f2"), ("codes", "u1", 16)]),
    GGMLQuantizationType.Q8_0: np.dtype([("scale", "<f2"), ("codes", "i1", 32)]),
    GGMLQuantizationType.Q6_K: np.dtype([("codes", "u1", 192), ("scales", "i1", 16), ("scale", "<f2")]),
}
"""Layout of a block, by format."""
_VARIANCE = {
    GGMLQuantizationType.Q4_0: (16**2 - 1) / 12,
    GGMLQuantizationType.Q8_0: (256**2 - 1) / 12,
    GGMLQuantizationType.Q6_K: (64**2 - 1) / 12,
}
"""Variance of evenly drawn codes, by format."""
_INNER_SCALES = (6, 11)
"""Range of the second scales of Q6_K, which its first scale multiplies."""


def row_bytes(kind: GGMLQuantizationType, columns: int) -> int:
    """Bytes of a row."""
    values, bytes_ = GGML_QUANT_SIZES[kind]
    return int(columns // values * bytes_)


def draw_rows(rng: np.random.Generator, kind: GGMLQuantizationType, rows: int, columns: int) -> NDArray[np.uint8]:
    """Rows of a matrix with so many columns, as bytes [rows * bytes of a row]; F32 is normally distributed."""
    deviation = columns**-0.5
    if kind == GGMLQuantizationType.F32:
        return (rng.standard_normal(rows * columns, np.float32) * np.float32(deviation)).view(np.uint8)
    layout = _BLOCKS[kind]
    size = rows * row_bytes(kind, columns)
    drawn = rng.integers(0, 2**64, -(-size // 8), dtype=np.uint64).view(np.uint8)[:size]
    blocks = drawn.view(layout)
    scale = deviation / _VARIANCE[kind] ** 0.5
    if "scales" in (layout.names or ()):
        blocks["scales"] = rng.integers(*_INNER_SCALES, (len(blocks), 16), np.int8)
        scale /= sum(range(*_INNER_SCALES)) / len(range(*_INNER_SCALES))
    blocks["scale"] = scale * (0.9 + 0.2 * rng.random(len(blocks), np.float32))
    return drawn
