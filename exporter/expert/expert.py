"""Exports one expert: streams, quantises and writes it, and measures the result against fp32.

One pass over the source does it all. While a slab of float32 weights is in the cache it is hashed,
checked, multiplied with the probe rows (the fp32 reference) and encoded.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
from threadpoolctl import threadpool_limits

from common.files import atomic_write
from exporter.checkpoint.matrices import ExpertTensors, MatrixRef
from exporter.checkpoint.safetensors_file import TensorReader
from exporter.checkpoint.slabs import stream_rows
from exporter.errors import CheckpointError
from exporter.expert.activations import gated
from exporter.expert.calibrated import CalibratedEncoder, InputStatistics
from exporter.expert.encoders import BITS, Encoder, Stored, make_encoder
from exporter.expert.graph import SILU, Layout, build_graph, matrix_shape, plan_layout
from exporter.expert.layer_inputs import expert_rows, load_layer
from exporter.expert.probe import PROBE_ROWS, relative_error, run_rows
from wire.experts import ExpertId
from wire.manifest import Dims, ExpertEntry, ExpertGraph, FileEntry, Quantisation
from wire.probe import encode_probe_output, probe_input
from wire.tensors import Array


@dataclass(frozen=True)
class ExpertJob:
    """The inputs of exporting one expert, or one slice of it; small enough to be sent to another process.

    Attributes:
        tensors, dims: of a slice, only its inner neurons.
        out: the bundle folder.
        threads: for onnxruntime.
        preset: of the optimum backend.
        graph: what the expert computes.
        calibration: folder with the layers' inputs on a text (`layer_inputs`), for the least error on them; None for
            the least error of the weights.
    """

    id: ExpertId
    tensors: ExpertTensors
    dims: Dims
    quantisation: Quantisation
    out: Path
    threads: int = 1
    preset: str = ""
    graph: ExpertGraph = SILU
    calibration: Path | None = None
    slice: int = 0
    slices: int = 1


def slice_of(job: ExpertJob, slice_: int, slices: int) -> ExpertJob:
    """The job of one slice of an expert, from the job of the whole.

    Raises:
        ValueError: the expert has fewer blocks of inner neurons than `slices`.
    """
    if slices == 1:
        return job
    first, stop = slice_bounds(job.dims.intermediate, job.quantisation, slices)[slice_]
    dims = msgspec.structs.replace(job.dims, intermediate=stop - first)
    return replace(job, tensors=job.tensors.inner(first, stop), dims=dims, slice=slice_, slices=slices)


def slice_bounds(intermediate: int, quantisation: Quantisation, slices: int) -> list[tuple[int, int]]:
    """The inner neurons of each slice, from the first to before the second, as even as blocks allow.

    No block of weights is cut, because its weights share a scale: the slices' weights are those of the whole expert.

    Raises:
        ValueError: there are fewer blocks than `slices`.
    """
    unit = quantisation.block or 1
    blocks = -(-intermediate // unit)
    if blocks < slices:
        shared = f" in blocks of {unit}" if unit > 1 else ""
        raise ValueError(f"{intermediate} inner neurons{shared} can't be cut into {slices} slices: at most {blocks}")
    ends = [min(intermediate, unit * (blocks * n // slices)) for n in range(slices + 1)]
    return list(pairwise(ends))


def expert_paths(expert: ExpertId, slice_: int = 0, slices: int = 1) -> tuple[str, str]:
    """Paths of graph and weights inside a bundle."""
    cut = f"-{slice_}of{slices}" if slices > 1 else ""
    stem = f"experts/L{expert.layer:02d}/E{expert.expert}{cut}"
    return f"{stem}.onnx", f"{stem}.weights"


def export_expert(job: ExpertJob) -> ExpertEntry:
    """Write graph and weights of one expert and return its manifest entry.

    Both files appear complete or not at all, the weights first.

    Raises:
        CheckpointError: a weight is not finite, does not fit the scheme, or can't be read.
        StorageError: a file could not be written.
        BundleError: onnxruntime can't run what was written.
    """
    graph_path, weights_path = expert_paths(job.id, job.slice, job.slices)
    layout = plan_layout(job.dims, job.quantisation, job.graph)
    # The reference products are far too small to share: BLAS threads would wait for each other at every slab,
    # measured at 300 times the arithmetic on a busy machine.
    with threadpool_limits(1, "blas"), open_writer(job.out, weights_path) as weights:
        reference, source_sha256 = _write_weights(job, layout, weights)
    graph = build_graph(job.dims, job.quantisation, layout, Path(weights_path).name, job.graph)
    with open_writer(job.out, graph_path) as file:
        file.write(graph)
    probe = probe_input(job.dims.hidden, PROBE_ROWS)
    together = job.quantisation.scheme != "int8-dynamic"
    outputs = run_rows(job.out / graph_path, probe, job.threads, together=together)
    return ExpertEntry(
        layer=job.id.layer,
        expert=job.id.expert,
        files=(file.entry(), weights.entry()),
        probe_output=encode_probe_output(outputs[0]),
        error=relative_error(outputs, reference),
        source_sha256=source_sha256,
        slice=job.slice,
        slices=job.slices,
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
    tensors = job.tensors
    x, weights_of_rows = probe_input(job.dims.hidden, PROBE_ROWS), None
    if job.calibration is not None:
        rows, weights_of_rows = expert_rows(load_layer(job.calibration, job.id.layer), job.id.expert)
        x = np.concatenate([x, rows])
    with TensorReader() as reader:

        def encode(matrix: str, values: MatrixRef, bias: MatrixRef | None, x: Array, encoder: Encoder) -> Array:
            return _encode_matrix(layout, matrix, values, bias, x, encoder, weights, reader, source)

        make = _encoder_maker(job, x, weights_of_rows)
        gate = encode("w1", tensors.w1, tensors.b1, x, make("w1"))
        up = encode("w3", tensors.w3, tensors.b3, x, make("w3"))
        inner = gated(job.graph, gate, up)
        del gate, up
        encoder = _encoder_maker(job, inner, weights_of_rows)("w2")
        output = encode("w2", tensors.w2, tensors.b2, inner[:PROBE_ROWS], encoder)
    return output, source.hexdigest()


def _encoder_maker(job: ExpertJob, x: Array, weights: Array | None) -> Callable[[str], Encoder]:
    """Makes encoders of matrices that have the inputs x, of which those behind the probe rows calibrate.

    Args:
        x: float32 [rows, columns], the probe rows first.
        weights: how much each of the other rows counts; None if there are none.
    """
    quantisation = job.quantisation
    if weights is None:
        return lambda matrix: make_encoder(quantisation.of_matrix(matrix), *matrix_shape(job.dims, matrix))
    statistics = InputStatistics(x[PROBE_ROWS:], weights)
    return lambda matrix: CalibratedEncoder(
        *matrix_shape(job.dims, matrix),
        BITS[quantisation.of_matrix(matrix).scheme],
        quantisation.block,
        quantisation.symmetric,
        statistics,
    )


def hash_source(tensors: ExpertTensors) -> str:
    """`ExpertEntry.source_sha256` of an expert, read again.

    Raises:
        CheckpointError: a tensor can't be read.
    """
    sha256 = hashlib.sha256()
    with TensorReader() as reader:
        for matrix in tensors.matrices:
            for _ in stream_rows(reader, matrix, sha256):
                pass
    return sha256.hexdigest()


def _encode_matrix(
    layout: Layout,
    matrix: str,
    values: MatrixRef,
    bias: MatrixRef | None,
    x: Array,
    encoder: Encoder,
    weights: HashingWriter,
    reader: TensorReader,
    source: Any,
) -> Array:
    """Write one matrix's parts and its bias; returns x · matrixᵀ + bias in fp32."""
    first_part, *other_parts = layout.parts[matrix]
    product = np.empty((len(x), values.shape[0]), np.float32)
    # With the few rows as columns of contiguous memory, BLAS does not rearrange the slab: half the time.
    inputs = np.ascontiguousarray(x.T)
    weights.pad_to(first_part.offset)
    for first, slab in stream_rows(reader, values, source):
        part = _checked_product(values, slab, inputs).T
        product[:, first : first + len(slab)] = part
        try:
            weights.write(encoder.encode(slab))
        except ValueError as error:
            raise CheckpointError(f"tensor '{values.name}': {error}") from None
    pending: list[Stored] = encoder.finish()
    if bias is not None:
        pending.append(_read_bias(reader, bias, source))
        product += pending[-1]
    elif other_parts and other_parts[-1].part.suffix == "bias":  # of a slice's w2: its bias is in the first slice
        pending.append(np.zeros(len(product[0]), np.float32))
    # The first part was streamed, unless the encoder returns all parts at the end.
    placed = [first_part, *other_parts][-len(pending) :] if pending else []
    for where, data in zip(placed, pending, strict=True):
        weights.pad_to(where.offset)
        weights.write(data)
    return product


def _read_bias(reader: TensorReader, bias: MatrixRef, source: Any) -> Array:
    """A bias, float32 [outputs]."""
    values = np.concatenate([slab[:, 0].copy() for _, slab in stream_rows(reader, bias, source)])
    if not np.isfinite(values).all():
        raise CheckpointError(f"tensor '{bias.name}' holds NaN or infinite values: it is damaged")
    return values


def _checked_product(tensor: MatrixRef, slab: Array, inputs: Array) -> Array:
    """slab · inputs, with a check that all weights are finite."""
    with np.errstate(all="ignore"):
        product: Array = slab @ inputs
    # Any NaN or infinity among the weights makes a whole row non-finite, so nothing else is scanned.
    if not np.isfinite(product).all():
        if not np.isfinite(slab).all():
            raise CheckpointError(f"tensor '{tensor.name}' holds NaN or infinite values: it is damaged")
        raise CheckpointError(f"tensor '{tensor.name}' holds values so large that fp32 outputs overflow")
    return product
