"""Experts with random weights, of the sizes of well-known models, exported like any other."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from exporter.checkpoint.matrices import ExpertTensors, matrix_ref
from exporter.checkpoint.safetensors_file import TensorRef
from exporter.expert.graph import MATRICES, matrix_shape
from exporter.expert.probe import probe_tolerance
from wire.manifest import SCHEMA, Dims, ExpertEntry, Manifest, Quantisation, Source, mixtral_architecture

MIXTRAL = Dims(hidden=4096, intermediate=14336, layers=1, experts=1, top_k=1, vocab=1, max_positions=1)
QWEN3_30B = Dims(hidden=2048, intermediate=768, layers=48, experts=128, top_k=8, vocab=1, max_positions=1)
_NOTHING = "0" * 64


def random_weights(folder: Path, dims: Dims) -> ExpertTensors:
    """Write one expert's normally distributed bf16 weights (Mixtral: 352 MB), scaled to make outputs about as large as
    inputs."""
    path, rng, offset = folder / "weights", np.random.default_rng(0), 0
    tensors = []
    with path.open("wb") as file:
        for matrix in MATRICES:
            shape = matrix_shape(dims, matrix)
            values = rng.standard_normal(shape, np.float32) * np.float32(shape[1] ** -0.5)
            file.write((values.view(np.uint32) >> 16).astype("<u2").tobytes())
            tensors.append(matrix_ref(TensorRef(matrix, path, "BF16", shape, offset), shape))
            offset = file.tell()
    return ExpertTensors(*tensors)


def manifest_of(entries: Sequence[ExpertEntry], dims: Dims, quantisation: Quantisation) -> Manifest:
    """A manifest of these experts, which is not written."""
    return Manifest(
        schema=SCHEMA,
        source=Source(name="random", config_sha256=_NOTHING, header_sha256={}, dtype="BF16"),
        dims=dims,
        quantisation=quantisation,
        probe_tolerance=probe_tolerance(quantisation),
        experts=tuple(entries),
        trunk=(),
        tools={},
        architecture=mixtral_architecture(dims.layers),
    )
