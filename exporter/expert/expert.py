"""Exports one expert: streams, quantises and writes it, and measures the result against fp32.

One pass over the source does it all. While a slab of float32 weights is in the cache it is hashed,
checked, multiplied with the probe rows (the fp32 reference) and encoded.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from threadpoolctl import threadpool_limits

from common.files import atomic_write
from exporter.checkpoint.checkpoint import ExpertTensors
from exporter.checkpoint.safetensors_file import TensorReader, TensorRef
from exporter.checkpoint.slabs import stream_rows
from exporter.errors import CheckpointError
from exporter.expert.encoders import Stored, make_encoder
from exporter.expert.graph import Layout, build_graph, matrix_shape, plan_layout
from exporter.expert.probe import PROBE_ROWS, relative_error, run_rows
from wire.experts import ExpertId
from wire.manifest import Dims, ExpertEntry, FileEntry, Quantisation, encode_probe_output, probe_input
from wire.tensors import Array


@dataclass(frozen=True)
class ExpertJob:
    """The inputs of exporting one expert; small enough to be sent to another process.

    Attributes:
        out: the bundle folder.
        threads: for onnxruntime.
        preset: of the optimum backend.
    """

    id: ExpertId
    tensors: ExpertTensors
    dims: Dims
    quantisation: Quantisation
    out: Path
    threads: int = 1
    preset: str = ""


def expert_paths(expert: ExpertId) -> tuple[str, str]:
    """Paths of graph and weights inside a bundle."""
    stem = f"experts/L{expert.layer:02d}/E{expert.expert}"
    return f"{stem}.onnx", f"{stem}.weights"


def export_expert(job: ExpertJob) -> ExpertEntry:
    """Write graph and weights of one expert and return its manifest entry.

    Both files appear complete or not at all, the weights first.

    Raises:
        CheckpointError: a weight is not finite, does not fit the scheme, or can't be read.
        StorageError: a file could not be written.
        BundleError: onnxruntime can't run what was written.
    """
    graph_path, weights_path = expert_paths(job.id)
    layout = plan_layout(job.dims, job.quantisation)
    # The reference products are far too small to share: BLAS threads would wait for each other at every slab,
    # measured at 300 times the arithmetic on a busy machine.
    with threadpool_limits(1, "blas"), open_writer(job.out, weights_path) as weights:
        reference, source_sha256 = _write_weights(job, layout, weights)
    graph = build_graph(job.dims, job.quantisation, layout, Path(weights_path).name)
    with open_writer(job.out, graph_path) as file:
        file.write(graph)
    outputs = run_rows(job.out / graph_path, probe_input(job.dims.hidden, PROBE_ROWS), job.threads)
    return ExpertEntry(
        layer=job.id.layer,
        expert=job.id.expert,
        files=(file.entry(), weights.entry()),
        probe_output=encode_probe_output(outputs[0]),
        error=relative_error(outputs, reference),
        source_sha256=source_sha256,
    )


class HashingWriter:
    """A file that is written sequentially, with its size and SHA-256."""

    def __init__(self, path: str, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._sha256 = hashlib.sha256()
        self.position = 0

    def write(self, data: Any) -> None:
        """Append the bytes of an object with a contiguous buffer."""
        if len(data) == 0:
            return
        view = memoryview(data).cast("B")
        self._file.write(view)
        self._sha256.update(view)
        self.position += len(view)

    def pad_to(self, position: int) -> None:
        """Append zeros up to `position`."""
        self.write(bytes(position - self.position))

    def entry(self) -> FileEntry:
        """The manifest entry of the file as written so far."""
        return FileEntry(path=self._path, bytes=self.position, sha256=self._sha256.hexdigest())


@contextmanager
def open_writer(out: Path, path: str) -> Iterator[HashingWriter]:
    """Write the file `path` of the bundle `out`, which gets its name when it is complete.

    Raises:
        StorageError: the file can't be written.
    """
    with atomic_write(out / path) as file:
        yield HashingWriter(path, file)


def _write_weights(job: ExpertJob, layout: Layout, weights: HashingWriter) -> tuple[Array, str]:
    """Stream all three matrices; returns the fp32 outputs for the probe rows and the source's hash."""
    source = hashlib.sha256()
    with TensorReader() as reader:

        def encode(matrix: str, tensor: TensorRef, x: Array) -> Array:
            return _encode_matrix(job, layout, matrix, tensor, x, weights, reader, source)

        x = probe_input(job.dims.hidden, PROBE_ROWS)
        gate = encode("w1", job.tensors.w1, x)
        up = encode("w3", job.tensors.w3, x)
        output = encode("w2", job.tensors.w2, silu(gate) * up)
    return output, source.hexdigest()


def hash_source(tensors: ExpertTensors) -> str:
    """`ExpertEntry.source_sha256` of an expert, read again.

    Raises:
        CheckpointError: a tensor can't be read.
    """
    sha256 = hashlib.sha256()
    with TensorReader() as reader:
        for tensor in tensors:
            for chunk in reader.chunks(tensor):
                sha256.update(chunk)
    return sha256.hexdigest()


def silu(x: Array) -> Array:
    """x · sigmoid(x) without overflow."""
    # tanh saturates where exp would overflow.
    return np.asarray(x * (np.float32(0.5) * np.tanh(np.float32(0.5) * x) + np.float32(0.5)), np.float32)


def _encode_matrix(
    job: ExpertJob,
    layout: Layout,
    matrix: str,
    tensor: TensorRef,
    x: Array,
    weights: HashingWriter,
    reader: TensorReader,
    source: Any,
) -> Array:
    """Write one matrix's parts; returns x · matrixᵀ in fp32."""
    rows, columns = matrix_shape(job.dims, matrix)
    encoder = make_encoder(job.quantisation, rows, columns)
    first_part, *other_parts = layout.parts[matrix]
    product = np.empty((len(x), rows), np.float32)
    weights.pad_to(first_part.offset)
    for first, slab in stream_rows(reader, tensor, source):
        part = _checked_product(tensor, x, slab)
        product[:, first : first + len(slab)] = part
        try:
            weights.write(encoder.encode(slab))
        except ValueError as error:
            raise CheckpointError(f"tensor '{tensor.name}': {error}") from None
    pending: list[Stored] = encoder.finish()
    # The first part was streamed, unless the encoder returns all parts at the end.
    placed = [first_part, *other_parts][-len(pending) :] if pending else []
    for where, data in zip(placed, pending, strict=True):
        weights.pad_to(where.offset)
        weights.write(data)
    return product


def _checked_product(tensor: TensorRef, x: Array, slab: Array) -> Array:
    """x · slabᵀ, with a check that all weights are finite."""
    with np.errstate(all="ignore"):
        product: Array = x @ slab.T
    # Any NaN or infinity among the weights makes a whole column non-finite, so nothing else is scanned.
    if not np.isfinite(product).all():
        if not np.isfinite(slab).all():
            raise CheckpointError(f"tensor '{tensor.name}' holds NaN or infinite values: it is damaged")
        raise CheckpointError(f"tensor '{tensor.name}' holds values so large that fp32 outputs overflow")
    return product
