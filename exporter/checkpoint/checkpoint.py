"""Checks a Hugging Face folder of a mixture of experts: dimensions, the place of every expert, the trunk's tensors.

Only config.json and headers are read here, no tensors.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from exporter.checkpoint.families import FAMILIES
from exporter.checkpoint.layouts import FP8, FP8_SCALES, find_experts, is_routed
from exporter.checkpoint.matrices import FLOAT_DTYPES, ExpertTensors, matrix_ref
from exporter.checkpoint.model_config import read_model_config
from exporter.checkpoint.safetensors_file import SafetensorsFile, TensorRef, read_header
from exporter.checkpoint.source_file import locate, read_json, source_name
from exporter.checkpoint.survey import survey
from exporter.errors import CheckpointError
from wire.experts import ExpertId
from wire.manifest import Architecture, Dims, Source

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_NAME_BYTES = 255


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose config and headers are valid.

    Attributes:
        folder: of the checkpoint.
        dims: dimensions of the model.
        architecture: of the model.
        source: name and hashes, for the manifest.
        experts: the tensors of each expert.
        trunk: the trunk's tensors, in file order, without scales.
        scales: of FP8 tensors, by the tensor's name.
        unknown: names of tensors that the model does not have.
    """

    folder: Path
    dims: Dims
    architecture: Architecture
    source: Source
    experts: dict[ExpertId, ExpertTensors]
    trunk: tuple[TensorRef, ...]
    scales: dict[str, TensorRef]
    unknown: tuple[str, ...]

    def shard_stamps(self, tensors: Iterable[TensorRef]) -> dict[str, tuple[int, int]]:
        """Size in bytes and modification time in ns of the files that hold `tensors`, by file name.

        A resumed export finds out from them whether a shard has been replaced.
        """
        stamps = {}
        for path in sorted({t.file for t in tensors}):
            stat = path.stat()
            stamps[path.name] = (stat.st_size, stat.st_mtime_ns)
        return stamps


def open_checkpoint(folder: Path) -> Checkpoint:
    """Check a checkpoint folder's config and safetensors headers.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete, damaged, of an unknown family, or quantised in a way
            that can't be read.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: give the folder that holds config.json")
    config = read_model_config(folder)
    files = _read_files(folder, FAMILIES[config.kind].example)
    tensors = {name: ref for file in files for name, ref in file.tensors.items()}
    scales = {name.removesuffix(FP8_SCALES): ref for name, ref in tensors.items() if name.endswith(FP8_SCALES)}
    routed = {name: ref for name, ref in tensors.items() if is_routed(name)}
    others = [ref for name, ref in tensors.items() if name not in routed and not name.endswith(FP8_SCALES)]
    found = survey(folder, config.kind, others)
    experts = find_experts(folder, routed, found.dims, found.architecture, alternating=found.alternating)
    used = {ref.name for expert in experts.values() for ref in expert.tensors}
    trunk = tuple(ref for ref in others if ref.name not in found.unknown)
    for ref in trunk:
        _check_readable(ref, scales.get(ref.name))
    source = Source(
        name=source_name(folder),
        config_sha256=hashlib.sha256(config.raw).hexdigest(),
        header_sha256={file.path.name: file.header_sha256 for file in files},
        dtype=",".join(sorted({matrix.dtype for expert in experts.values() for matrix in expert.matrices})),
    )
    unknown = [name for name in tensors if name in found.unknown or (name in routed and name not in used)]
    return Checkpoint(folder, found.dims, found.architecture, source, experts, trunk, scales, tuple(unknown))


def _check_readable(ref: TensorRef, scales: TensorRef | None) -> None:
    """Check the number format of a tensor of the trunk."""
    if ref.dtype == FP8 and scales is not None and len(ref.shape) == 2:
        rows, columns = ref.shape
        matrix_ref(ref, (rows, columns), scales=scales)
    elif ref.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"tensor '{ref.name}' is {ref.dtype}: outside of experts, only {', '.join(FLOAT_DTYPES)}, and FP8 with "
            "block scales, can be exported"
        )


def _read_files(folder: Path, example: str) -> list[SafetensorsFile]:
    # transformers prefers the single file too.
    if locate(folder, SINGLE_FILE).exists():
        return [read_header(folder / SINGLE_FILE)]
    if (index := read_json(folder, INDEX_FILE)) is not None:
        return _read_shards(folder, index)
    pickles = [p.name for pattern in ("*.bin", "*.bin.index.json", "*.pt", "*.pth") for p in folder.glob(pattern)]
    if pickles:
        raise CheckpointError(
            f"{folder} holds pickled weights only ({min(pickles)}): load it with transformers and save it "
            "with save_pretrained(…), which writes safetensors"
        )
    if other := [p.name for p in folder.glob("*.gguf")]:
        raise CheckpointError(
            f"{folder} holds GGUF weights only ({min(other)}), which can't be read exactly: download the original "
            f"safetensors checkpoint, such as {example}"
        )
    raise CheckpointError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}")


def weight_map(folder: Path, index: dict[str, Any]) -> dict[str, str]:
    """The shard of each tensor, by an index of safetensors files.

    Args:
        folder: of the checkpoint.
        index: content of its index.

    Raises:
        CheckpointError: the index is not valid, or names files outside the folder.
    """
    path = folder / INDEX_FILE
    try:
        placed = msgspec.convert(index["weight_map"], dict[str, str])
    except (KeyError, msgspec.ValidationError):
        raise CheckpointError(f"{path} is not a valid safetensors index") from None
    if outside := [s for s in placed.values() if Path(s).name != s or s in ("", "..")]:
        raise CheckpointError(f"{path} names a file outside its folder: {outside[0][:80]!r}")
    if strange := [s for s in placed.values() if not s.isprintable() or len(s.encode()) > _MAX_NAME_BYTES]:
        raise CheckpointError(f"{path} names a file that can't exist: {strange[0][:80]!r}")
    return placed


def _read_shards(folder: Path, index: dict[str, Any]) -> list[SafetensorsFile]:
    placed = weight_map(folder, index)
    shards = sorted(set(placed.values()))
    if missing := [s for s in shards if not locate(folder, s).exists()]:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(shards)} shards ({', '.join(missing[:3])}"
            f"{', …' if len(missing) > 3 else ''}): download it again"
        )
    files = [read_header(folder / shard) for shard in shards]
    for file in files:
        for name in [n for n, s in placed.items() if s == file.path.name]:
            if name not in file.tensors:
                raise CheckpointError(f"{file.path} lacks tensor '{name}' that {INDEX_FILE} places there")
        # A tensor that is not in the index belongs to no model and must stay out of the trunk.
        for name in [n for n in file.tensors if placed.get(n) != file.path.name]:
            del file.tensors[name]
    return files
