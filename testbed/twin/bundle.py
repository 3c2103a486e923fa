"""Writes the bundle of a twin without a checkpoint: int4 experts of random codes, and a random trunk.

The checkpoint of a large model, its export and its bundle together need a disk that few machines have. Here experts are
drawn in the format in which the exporter stores them, in several processes. Every expert's bytes are its own, so caches
and memory behave as with real weights. An expert's codes do not depend on the number of slices: bundles of one twin
compute the same.
"""

import hashlib
import importlib.metadata
import json
import math
import multiprocessing
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from common.disk_space import Room, check_room
from common.errors import StorageError
from common.files import atomic_write
from common.parent_death import end_with_parent
from exporter.checkpoint.safetensors_file import TensorRef, encode_header
from exporter.checkpoint.survey import survey
from exporter.expert.encoders import Stored
from exporter.expert.expert import expert_paths, open_writer, slice_bounds
from exporter.expert.graph import MATRICES, build_graph, matrix_shape, plan_layout
from exporter.expert.probe import probe_tolerance, run_rows
from testbed.twin.shapes import CONFIGS, TwinName, checkpoint_tensors, kept_layers
from testbed.twin.write import tensor_values, write_texts
from wire.errors import BundleError
from wire.experts import ExpertId
from wire.manifest import (
    MANIFEST_NAME,
    SCHEMA,
    Dims,
    ExpertEntry,
    FileEntry,
    Manifest,
    Quantisation,
    Source,
    load_manifest,
    sha256_file,
)
from wire.probe import encode_probe_output, probe_input
from wire.tensors import Array

INT4 = Quantisation(scheme="int4", block=32)
_CODE_DEVIATION = (255 / 12) ** 0.5
"""Standard deviation of codes drawn evenly from 0 to 15."""
_MIDDLE = 0x88
"""Two zero points of 8."""


@dataclass(frozen=True, slots=True)
class _ExpertDraw:
    """One expert to draw and write, with all its slices; small enough to be sent to another process."""

    out: Path
    dims: Dims
    id: ExpertId
    seed: int


def write_twin_bundle(
    out: Path, name: TwinName, *, layers: int | None, slices: int, seed: int, jobs: int,
    progress: Callable[[int, int], None],
) -> Manifest:  # fmt: skip
    """Write a twin's bundle to `out`, or cut the one that is there into another number of slices; nothing is done if it
    is as wanted.

    Only one number of slices is kept at a time. The trunk is kept.

    Args:
        layers: number of layers; None for all.
        slices: of each expert.
        jobs: processes, each of which takes up to four times the size of an expert in RAM; with 1, this process does
            all the work.
        progress: called with the number of finished experts and of all.

    Raises:
        StorageError: `out` can't be written or is too small.
        BundleError: `out` holds something else.
        ValueError: the model does not have so many layers, or the experts can't be cut into that many slices.
    """
    kept = kept_layers(name, layers)
    config = {**CONFIGS[name], "num_hidden_layers": kept, "torch_dtype": "bfloat16"}
    before = _before(out)
    source = Source(
        name=f"{name}-twin-{kept}-layers-{seed}",
        config_sha256=hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        header_sha256={},
        dtype="BF16",
    )
    if before is not None and before.source != source:
        raise BundleError(f"{out} holds another bundle ({before.source.name}): choose another folder or remove it")
    if before is not None and before.dims.slices == slices:
        return before
    try:
        # First the manifest: a folder with one is complete.
        (out / MANIFEST_NAME).unlink(missing_ok=True)
        shutil.rmtree(out / "experts", ignore_errors=True)
        if before is None:
            (out / "trunk").mkdir(parents=True, exist_ok=True)
            write_texts(out / "trunk", config)
        found = before or survey(out / "trunk", config["model_type"], None)
        dims = msgspec.structs.replace(found.dims, slices=slices)
        slice_bounds(dims.intermediate, INT4, slices)
        trunk_bytes = 0 if before else sum(2 * math.prod(tensor.shape) for tensor in _trunk_tensors(config))
        needed = trunk_bytes + dims.layers * dims.experts * plan_layout(dims, INT4).bytes
        check_room([Room(out, needed, "the bundle")], remedy="choose another folder or fewer --layers")
        ids = [ExpertId(layer, expert) for layer in range(dims.layers) for expert in range(dims.experts)]
        work = [_ExpertDraw(out, dims, id, seed) for id in ids]
        entries, weights = _draw_all(out, work, None if before else config, seed, jobs, progress)
    except OSError as error:
        raise StorageError(f"can't write {out}: {error.strerror}") from None
    manifest = Manifest(
        schema=SCHEMA,
        source=source,
        dims=dims,
        quantisation=INT4,
        probe_tolerance=probe_tolerance(INT4),
        experts=tuple(sorted(entries, key=lambda entry: entry.id)),
        trunk=before.trunk if before else (*weights, *_text_entries(out)),
        tools={"onnxruntime": importlib.metadata.version("onnxruntime")},
        architecture=found.architecture,
    )
    with atomic_write(out / MANIFEST_NAME) as file:
        file.write(msgspec.json.encode(manifest))
    return manifest


def _before(out: Path) -> Manifest | None:
    """The manifest of the bundle in `out`; None if there is no complete one."""
    if (out / MANIFEST_NAME).exists():
        return load_manifest(out)
    if out.exists() and any(path.name not in ("experts", "trunk") for path in out.iterdir()):
        raise BundleError(f"{out} is not empty and not a twin's bundle: choose another folder")
    return None


def _trunk_tensors(config: dict[str, Any]) -> list[Any]:
    return [tensor for tensor in checkpoint_tensors(config) if ".experts." not in tensor.name]


def _draw_all(
    out: Path, work: list[_ExpertDraw], config: dict[str, Any] | None, seed: int, jobs: int,
    progress: Callable[[int, int], None],
) -> tuple[list[ExpertEntry], list[FileEntry]]:  # fmt: skip
    """Draw all experts, and the trunk if a config is given, in several processes."""
    entries: list[ExpertEntry] = []
    if jobs == 1:
        weights = [_write_trunk(out, config, seed)] if config else []
        for done, draw in enumerate(work, start=1):
            entries += _draw(draw)
            progress(done, len(work))
        return entries, weights
    # spawn, because a fork would inherit onnxruntime's and BLAS's threads in an undefined state.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=end_with_parent) as pool:
        try:
            trunk = [pool.submit(_write_trunk, out, config, seed)] if config else []
            for done, future in enumerate(as_completed([pool.submit(_draw, draw) for draw in work]), start=1):
                entries += future.result()
                progress(done, len(work))
            return entries, [future.result() for future in trunk]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _write_trunk(out: Path, config: dict[str, Any], seed: int) -> FileEntry:
    tensors = _trunk_tensors(config)
    with open_writer(out, "trunk/model.safetensors") as writer:
        writer.write(encode_header(TensorRef(t.name, out, "BF16", t.shape, 0) for t in tensors))
        for place, tensor in enumerate(tensors):
            for piece in tensor_values(tensor, seed, place):
                writer.write(piece)
    return writer.entry()


def _text_entries(out: Path) -> list[FileEntry]:
    return [
        FileEntry(path=f"trunk/{path.name}", bytes=path.stat().st_size, sha256=sha256_file(path))
        for path in sorted((out / "trunk").glob("*.json"))
    ]


def _draw(draw: _ExpertDraw) -> list[ExpertEntry]:
    """Draw one expert, and write its slices."""
    dims = draw.dims
    rng = np.random.Generator(np.random.SFC64([draw.seed, *draw.id]))
    whole = {matrix: _matrix(rng, *matrix_shape(dims, matrix)) for matrix in MATRICES}
    bounds = slice_bounds(dims.intermediate, INT4, dims.slices)
    return [_write_slice(draw, number, first, stop, whole) for number, (first, stop) in enumerate(bounds)]


def _matrix(rng: np.random.Generator, rows: int, columns: int) -> tuple[Stored, Array]:
    """Codes uint8 [rows, blocks, bytes] and scales float32 [rows, blocks]; outputs are about as large as inputs."""
    blocks = -(-columns // INT4.block)
    count = rows * blocks * INT4.block // 2
    codes = rng.integers(0, 2**64, -(-count // 8), dtype=np.uint64).view(np.uint8)[:count]
    scales = rng.random((rows, blocks), np.float32) * np.float32(0.2) + np.float32(0.9)
    return codes.reshape(rows, blocks, -1), scales * np.float32(columns**-0.5 / _CODE_DEVIATION)


def _write_slice(
    draw: _ExpertDraw, number: int, first: int, stop: int, whole: dict[str, tuple[Stored, Array]]
) -> ExpertEntry:
    """Write the inner neurons from `first` to before `stop`."""
    dims = msgspec.structs.replace(draw.dims, intermediate=stop - first)
    layout = plan_layout(dims, INT4)
    graph_path, weights_path = expert_paths(draw.id, number, draw.dims.slices)
    with open_writer(draw.out, weights_path) as weights:
        for matrix, placed in layout.parts.items():
            codes, scales = whole[matrix]
            if matrix == "w2":
                some = slice(first // INT4.block, -(-stop // INT4.block))
                codes, scales = codes[:, some], scales[:, some]
            else:
                codes, scales = codes[first:stop], scales[first:stop]
            zeros = np.full(placed[-1].part.shape, _MIDDLE, np.uint8)
            for where, data in zip(placed, (codes, scales, zeros), strict=True):
                weights.pad_to(where.offset)
                weights.write(np.ascontiguousarray(data))
    with open_writer(draw.out, graph_path) as graph:
        graph.write(build_graph(dims, INT4, layout, Path(weights_path).name))
    return ExpertEntry(
        layer=draw.id.layer,
        expert=draw.id.expert,
        files=(graph.entry(), weights.entry()),
        probe_output=encode_probe_output(run_rows(draw.out / graph_path, probe_input(dims.hidden))[0]),
        error=0.0,
        source_sha256=hashlib.sha256(f"{draw.seed} {draw.id}".encode()).hexdigest(),
        slice=number,
        slices=draw.dims.slices,
    )
