"""An expert of Mixtral-8x7B's size with random weights, exported like any other."""

from pathlib import Path

import numpy as np

from exporter.checkpoint.matrices import ExpertTensors, matrix_ref
from exporter.checkpoint.safetensors_file import TensorRef
from exporter.expert.expert import ExpertJob, export_expert
from exporter.expert.graph import MATRICES, matrix_shape
from exporter.expert.probe import probe_tolerance
from wire.experts import ExpertId
from wire.manifest import SCHEMA, Dims, Manifest, Quantisation, Source, mixtral_architecture

MIXTRAL = Dims(hidden=4096, intermediate=14336, layers=1, experts=1, top_k=1, vocab=1, max_positions=1)
ID = ExpertId(0, 0)
_NOTHING = "0" * 64


def random_weights(folder: Path) -> ExpertTensors:
    """Write 352 MB of normally distributed bf16 weights, scaled to make outputs about as large as inputs."""
    path, rng, offset = folder / "weights", np.random.default_rng(0), 0
    tensors = []
    with path.open("wb") as file:
        for matrix in MATRICES:
            shape = matrix_shape(MIXTRAL, matrix)
            values = rng.standard_normal(shape, np.float32) * np.float32(shape[1] ** -0.5)
            file.write((values.view(np.uint32) >> 16).astype("<u2").tobytes())
            tensors.append(matrix_ref(TensorRef(matrix, path, "BF16", shape, offset), shape))
            offset = file.tell()
    return ExpertTensors(*tensors)


def export_big_expert(weights: ExpertTensors, quantisation: Quantisation, out: Path) -> Manifest:
    """Export the expert to `out`, and return a manifest, which is not written."""
    entry = export_expert(ExpertJob(ID, weights, MIXTRAL, quantisation, out))
    return Manifest(
        schema=SCHEMA,
        source=Source(name="random", config_sha256=_NOTHING, header_sha256={}, dtype="BF16"),
        dims=MIXTRAL,
        quantisation=quantisation,
        probe_tolerance=probe_tolerance(quantisation),
        experts=(entry,),
        trunk=(),
        tools={},
        architecture=mixtral_architecture(MIXTRAL.layers),
    )
