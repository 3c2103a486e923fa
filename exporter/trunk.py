"""The trunk of a bundle: all that is no expert, with config and tokenizer, as transformers reads it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from exporter.checkpoint import Checkpoint
from exporter.expert import open_writer
from exporter.safetensors_file import TensorReader, TensorRef, encode_header
from wire.errors import CheckpointError
from wire.manifest import FileEntry

_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# Exponent bits, all set in NaN and infinities only.
_EXPONENTS = {"BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00), "F32": ("<u4", 0x7F800000)}


def copy_trunk(source: Checkpoint, out: Path) -> Iterator[FileEntry]:
    """Write `out/trunk/`; yields an entry per file.

    Raises:
        CheckpointError: a tensor is not finite or can't be read.
        StorageError: a file could not be written.
    """
    with open_writer(out, "trunk/model.safetensors") as writer, TensorReader() as reader:
        writer.write(encode_header(source.trunk))
        for tensor in source.trunk:
            for chunk in reader.chunks(tensor):
                _check_finite(tensor, chunk)
                writer.write(chunk)
    yield writer.entry()
    for name in _FILES:
        path = source.folder / name
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise CheckpointError(f"can't read {path}: {error.strerror}") from None
        with open_writer(out, f"trunk/{name}") as writer:
            writer.write(data)
        yield writer.entry()


def trunk_bytes(source: Checkpoint) -> int:
    """About how many bytes `copy_trunk` writes."""
    files = (source.folder / name for name in _FILES)
    return sum(ref.bytes for ref in source.trunk) + sum(p.stat().st_size for p in files if p.exists())


def _check_finite(tensor: TensorRef, chunk: memoryview) -> None:
    if tensor.dtype not in _EXPONENTS:
        return
    dtype, mask = _EXPONENTS[tensor.dtype]
    bits = np.frombuffer(chunk, dtype)
    if bool(((bits & mask) == mask).any()):
        raise CheckpointError(f"tensor '{tensor.name}' holds NaN or infinite values: it is damaged")
