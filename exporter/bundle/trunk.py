"""The trunk of a bundle: all weights that belong to no expert, config and tokenizer, as transformers reads them."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exporter.checkpoint.checkpoint import Checkpoint
from exporter.checkpoint.layouts import FP8
from exporter.checkpoint.matrices import matrix_ref
from exporter.checkpoint.safetensors_file import TensorReader, TensorRef, encode_header
from exporter.checkpoint.slabs import stream_rows
from exporter.checkpoint.source_file import TEXT_FILES, parse_json, read_bytes
from exporter.errors import CheckpointError
from exporter.expert.expert import open_writer
from wire.manifest import FileEntry

_TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
# Mask of the exponent bits: all of them are set only in NaN and infinities.
_EXPONENTS = {"BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00), "F32": ("<u4", 0x7F800000)}


@dataclass(frozen=True)
class TrunkJob:
    """The inputs of copying the trunk's tensors.

    Attributes:
        out: the bundle folder.
    """

    source: Checkpoint
    out: Path


def copy_tensors(job: TrunkJob) -> FileEntry:
    """Write `out/trunk/model.safetensors`.

    Tensors keep their names and bytes, except that FP8 with scales becomes BF16, as when transformers dequantises it.

    Raises:
        CheckpointError: a tensor is not finite or can't be read.
        StorageError: the file could not be written.
    """
    source = job.source
    with open_writer(job.out, "trunk/model.safetensors") as writer, TensorReader() as reader:
        writer.write(encode_header(map(_stored, source.trunk)))
        for tensor in source.trunk:
            chunks = _dequantised(reader, source, tensor) if tensor.dtype == FP8 else reader.chunks(tensor)
            for chunk in chunks:
                _check_finite(_stored(tensor), chunk)
                writer.write(chunk)
    return writer.entry()


def copy_texts(source: Checkpoint, out: Path) -> Iterator[FileEntry]:
    """Write the trunk's other files, config and tokenizer; yields an entry per file.

    Raises:
        CheckpointError: a file can't be read.
        StorageError: a file could not be written.
    """
    for path, data in _texts(source):
        with open_writer(out, path) as writer:
            writer.write(data)
        yield writer.entry()


def check_tokenizer(source: Checkpoint) -> None:
    """Make sure that the checkpoint has a tokenizer, which the base station needs.

    Raises:
        CheckpointError: it has none.
    """
    if not any(all((source.folder / name).is_file() for name in names) for names in _TOKENIZERS):
        known = ", ".join(" with ".join(names) for names in _TOKENIZERS)
        raise CheckpointError(
            f"{source.folder} has no tokenizer (none of {known}), which a base station needs to read "
            "prompts: copy it from the source of the weights"
        )


def texts_current(source: Checkpoint, trunk: Iterable[FileEntry]) -> bool:
    """Whether config and tokenizer in these files of a bundle's trunk are those of the checkpoint.

    Raises:
        CheckpointError: a file of the checkpoint can't be read.
    """
    held = {file.path: file.sha256 for file in trunk}
    return all(held.get(path) == hashlib.sha256(data).hexdigest() for path, data in _texts(source))


def trunk_bytes(source: Checkpoint) -> int:
    """Roughly the number of bytes of all files of the trunk."""
    files = (source.folder / name for name in TEXT_FILES)
    return sum(_stored(ref).bytes for ref in source.trunk) + sum(p.stat().st_size for p in files if p.exists())


def _texts(source: Checkpoint) -> Iterator[tuple[str, bytes]]:
    """Path in a bundle, and content, of all files without tensors."""
    for name in TEXT_FILES:
        if (data := read_bytes(source.folder, name)) is not None:
            if name.endswith(".json"):
                document = parse_json(source.folder / name, data)
                # What is quantised in the checkpoint is so in no trunk.
                if name == "config.json" and document.pop("quantization_config", None):
                    data = json.dumps(document, indent=2).encode()
            yield f"trunk/{name}", data


def _stored(tensor: TensorRef) -> TensorRef:
    """A tensor of the checkpoint with the number format that it has in the bundle."""
    return dataclasses.replace(tensor, dtype="BF16") if tensor.dtype == FP8 else tensor


def _dequantised(reader: TensorReader, source: Checkpoint, tensor: TensorRef) -> Iterator[memoryview]:
    """BF16 values of an FP8 matrix, rounded to nearest even."""
    rows, columns = tensor.shape
    matrix = matrix_ref(tensor, (rows, columns), scales=source.scales[tensor.name])
    for _, slab in stream_rows(reader, matrix, hashlib.sha256()):
        bits = slab.view(np.uint32)
        yield ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype("<u2").data.cast("B")


def _check_finite(tensor: TensorRef, chunk: memoryview) -> None:
    if tensor.dtype not in _EXPONENTS:
        return
    dtype, mask = _EXPONENTS[tensor.dtype]
    bits = np.frombuffer(chunk, dtype)
    if bool(((bits & mask) == mask).any()):
        raise CheckpointError(f"tensor '{tensor.name}' holds NaN or infinite values: it is damaged")
