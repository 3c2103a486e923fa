"""The two parts of an export alone: reading and writing its bytes, and quantising its experts."""

import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.files import atomic_write
from common.parent_death import end_with_parent
from exporter.bundle.trunk import trunk_bytes
from exporter.checkpoint.checkpoint import Checkpoint
from exporter.checkpoint.safetensors_file import TensorReader, TensorRef
from exporter.checkpoint.slabs import slab_rows
from exporter.expert.encoders import make_encoder
from exporter.expert.expert import expert_paths
from exporter.expert.graph import MATRICES, build_graph, matrix_shape, plan_layout
from wire.manifest import Dims, Quantisation
from wire.tensors import Array

_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Copy:
    """Tensors to read, and sizes in bytes of the files to write then: those of the trunk, or of one expert."""

    tensors: Sequence[TensorRef]
    file_bytes: Sequence[int]

    @property
    def read_bytes(self) -> int:
        """Bytes to read."""
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def written_bytes(self) -> int:
        """Bytes to write."""
        return sum(self.file_bytes)


def copies(source: Checkpoint, quantisation: Quantisation) -> tuple[Copy, list[Copy]]:
    """What an export reads and writes: for the trunk, and for each expert."""
    kind = source.architecture.expert
    layout = plan_layout(source.dims, quantisation, kind)
    experts = []
    for id in sorted(source.experts):
        weights = Path(expert_paths(id)[1]).name
        graph = build_graph(source.dims, quantisation, layout, weights, kind)
        experts.append(Copy(source.experts[id].tensors, (layout.bytes, len(graph))))
    return Copy(source.trunk, (trunk_bytes(source),)), experts


def copy_all(work: Sequence[Copy], out: Path, threads: int) -> None:
    """Read the tensors and write as many bytes as an export does: temporary name, fsync, rename."""
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(_copy, work, (out / str(number) for number in range(len(work)))):
            pass


def _copy(copy: Copy, out: Path) -> None:
    with TensorReader() as reader:
        for tensor in copy.tensors:
            for _ in reader.chunks(tensor):
                pass
    data = memoryview(np.random.default_rng(0).bytes(_PIECE))  # zeros could be left out by the disk
    for number, size in enumerate(copy.file_bytes):
        with atomic_write(out / f"file-{number}") as file:
            for begin in range(0, size, _PIECE):
                file.write(data[: size - begin])


def forget_cached(files: Iterable[Path]) -> None:
    """Drop files from the page cache, so that they are read from the disk again."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


class Quantiser:
    """Processes that quantise weights in RAM, with nothing to read, check or write."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def run_s(self, experts: int) -> float:
        """Seconds for this many experts."""
        began_s = time.perf_counter()
        for _ in self._pool.map(_quantise, range(experts)):
            pass
        return time.perf_counter() - began_s


@contextmanager
def open_quantiser(dims: Dims, quantisation: Quantisation, processes: int) -> Iterator[Quantiser]:
    """Start the processes, each with the weights of one matrix as float32, and let each quantise."""
    spawn = multiprocessing.get_context("spawn")
    # Not `multiprocessing.Pool`, which waits for ever for the result of a process that the kernel killed for memory.
    with ProcessPoolExecutor(processes, mp_context=spawn, initializer=_prepare, initargs=(dims, quantisation)) as pool:
        quantiser = Quantiser(pool)
        quantiser.run_s(processes)
        yield quantiser


_state: tuple[Dims, Quantisation, Array]
"""Of a process of `Quantiser`."""


def _prepare(dims: Dims, quantisation: Quantisation) -> None:
    global _state
    end_with_parent()
    weights = np.random.default_rng(0).standard_normal(dims.hidden * dims.intermediate, np.float32)
    _state = dims, quantisation, weights


def _quantise(_number: int) -> None:
    """Encode the matrices of one expert by slabs, as an export does."""
    dims, quantisation, weights = _state
    for matrix in MATRICES:
        rows, columns = matrix_shape(dims, matrix)
        encoder = make_encoder(quantisation.of_matrix(matrix), rows, columns)
        values, step = weights.reshape(rows, columns), slab_rows(columns)
        for first in range(0, rows, step):
            encoder.encode(values[first : first + step])
        encoder.finish()
