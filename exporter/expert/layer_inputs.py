"""Files with the inputs of a layer's experts on a calibration text, and the rows that calibrate one expert."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from common.files import atomic_write
from wire.manifest import Dims
from wire.tensors import Array

MOST_ROWS = 4096
"""Rows that calibrate one expert at most: they bound its time and memory."""
FEW_ROWS = 256
"""An expert with fewer tokens of its own is calibrated with others of its layer as well."""
_OTHERS_WEIGHT = 0.1
"""Weight of these others, relative to the mean weight of the expert's own tokens."""


class LayerInputs(NamedTuple):
    """What the experts of one layer get, in the order of the text.

    Attributes:
        hidden: float32 [tokens, hidden].
        chosen: indices of each token's experts, int32 [tokens, k].
        weights: of these experts, float32 [tokens, k].
    """

    hidden: Array
    chosen: NDArray[np.int32]
    weights: Array


def layer_path(folder: Path, layer: int) -> Path:
    """The file of a layer with experts."""
    return folder / f"L{layer:02d}.safetensors"


def save_layer(folder: Path, layer: int, inputs: LayerInputs) -> None:
    """Write a layer's file, the inputs as bfloat16.

    Raises:
        StorageError: it can't be written.
    """
    bits = np.ascontiguousarray(inputs.hidden, np.float32).view(np.uint32)
    upper = ((bits + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)
    with atomic_write(layer_path(folder, layer)) as file:
        file.write(save({"hidden": upper, "chosen": inputs.chosen, "weights": inputs.weights}))


def layer_bytes(tokens: int, dims: Dims) -> int:
    """Bytes of a layer's file, roughly."""
    return tokens * (2 * dims.hidden + 8 * dims.top_k)


def load_layer(folder: Path, layer: int) -> LayerInputs:
    """Read a layer's file."""
    tensors = load_file(layer_path(folder, layer))
    hidden = (tensors["hidden"].astype(np.uint32) << np.uint32(16)).view(np.float32)
    return LayerInputs(hidden, tensors["chosen"], tensors["weights"])


def expert_rows(inputs: LayerInputs, expert: int) -> tuple[Array, Array]:
    """The inputs that calibrate an expert, float32 [rows, hidden], and how much each counts, float32 [rows].

    A token counts as the router weighs the expert for it. An expert with fewer than `FEW_ROWS` tokens also gets others
    of its layer, which count a tenth; one without tokens gets only these, which count 1.
    """
    tokens, place = np.nonzero(inputs.chosen == expert)
    tokens, place = _spread(tokens, MOST_ROWS), _spread(place, MOST_ROWS)
    weights = np.abs(inputs.weights[tokens, place])
    if len(tokens) < FEW_ROWS:
        others = _spread(np.setdiff1d(np.arange(len(inputs.hidden)), tokens), FEW_ROWS - len(tokens))
        each = _OTHERS_WEIGHT * weights.mean() if len(tokens) else 1.0
        tokens = np.concatenate([tokens, others])
        weights = np.concatenate([weights, np.full(len(others), each, np.float32)])
    return inputs.hidden[tokens], weights.astype(np.float32)


def _spread(values: NDArray[np.intp], most: int) -> NDArray[np.intp]:
    """At most `most` of the values, evenly spread."""
    if len(values) <= most:
        return values
    return values[np.arange(most) * len(values) // most]
