"""A mixture as a dense model: its trunk, and in each layer the mean of its experts instead of a choice of them.

It drafts better than the dense model that the experts were made from, where they differ little from each other.
"""

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from exporter.checkpoint.checkpoint import open_checkpoint
from exporter.checkpoint.matrices import MatrixRef
from exporter.checkpoint.safetensors_file import TensorReader
from exporter.checkpoint.slabs import stream_rows
from exporter.demo_model.base import FolderBase
from exporter.expert.encoders import BITS, Stored, make_encoder
from wire.experts import ExpertId
from wire.manifest import Quantisation
from wire.tensors import Array

if TYPE_CHECKING:
    import torch

_MATRIX = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.weight")
_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}


class ExpertMean(FolderBase):
    """The mean of a Mixtral's experts, as a dense Llama."""

    kind = "mixtral"

    def __init__(self, folder: Path, rounding: Quantisation) -> None:
        """Open a checkpoint.

        Args:
            folder: of the checkpoint.
            rounding: of the experts before the mean is taken, if blockwise. What nodes compute differs from the
                checkpoint by their rounding, most of which the mean then has too.

        Raises:
            CheckpointError: not a readable Mixtral.
        """
        super().__init__(folder)
        self._checkpoint, self._rounding = open_checkpoint(folder), rounding

    def tensor(self, name: str) -> "torch.Tensor":
        """One weight by its Hugging Face Llama name; the mean of the experts' in fp32."""
        import torch

        if (match := _MATRIX.fullmatch(name)) is None:
            return super().tensor(name)
        layer, matrix = int(match[1]), _NAMES[match[2]]
        experts = self._checkpoint.dims.experts
        total = np.zeros((1, 1), np.float32)
        with TensorReader() as reader:
            for expert in range(experts):
                ref: MatrixRef = getattr(self._checkpoint.experts[ExpertId(layer, expert)], matrix)
                total = total + self._read(reader, ref, matrix)
        return torch.from_numpy(total / np.float32(experts))

    def _read(self, reader: TensorReader, ref: MatrixRef, matrix: str) -> Array:
        """An expert's matrix as nodes compute with it, float32 [outputs, inputs]."""
        rows, columns = ref.shape
        quantisation = self._rounding.of_matrix(matrix)
        slabs = (slab for _, slab in stream_rows(reader, ref, hashlib.sha256()))
        if (bits := BITS.get(quantisation.scheme)) is None:
            return np.concatenate([slab.copy() for slab in slabs])
        encoder = make_encoder(quantisation, rows, columns)
        codes = _unpacked(np.concatenate([encoder.encode(slab).flatten() for slab in slabs]), bits)
        scales, *stored = encoder.finish()
        blocks = scales.size // rows
        middle = np.full((rows, blocks), 2 ** (bits - 1), np.float32)
        zeros = _unpacked(stored[0].ravel(), bits).reshape(rows, -1)[:, :blocks] if stored else middle
        values: Array = (codes.reshape(rows, blocks, -1) - zeros[..., None]) * scales.reshape(rows, blocks, 1)
        return values.reshape(rows, -1)[:, :columns]


def _unpacked(codes: Stored, bits: int) -> Array:
    """The codes as float32, one per number; of two in a byte the lower half is first."""
    pairs = np.stack([codes & 15, codes >> 4], axis=-1).ravel() if bits == 4 else codes
    return pairs.astype(np.float32)
