"""Writes a twin: sharded safetensors as on a hub, config.json and a tokenizer of bytes."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.disk_space import Room, check_room
from common.errors import StorageError
from common.files import atomic_write
from exporter.checkpoint.safetensors_file import TensorRef, encode_header
from testbed.twin.shapes import CONFIGS, Tensor, TwinName, checkpoint_tensors, kept_layers

SHARD_BYTES = 5 * 10**9
_BF16_BYTES = 2
_PIECE = 1 << 22
"""Values drawn at once."""
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
_SPECIAL = ("<|start|>", "<|end|>")


def write_twin(
    out: Path, name: TwinName, *, layers: int | None, seed: int, progress: Callable[[int, int], None]
) -> int:
    """Write a twin's checkpoint into the new folder `out`; returns its bytes.

    Args:
        layers: number of layers; None for all.
        progress: called with the bytes written so far and in all.

    Raises:
        StorageError: `out` exists, can't be written or is too small.
        ValueError: the model does not have so many layers.
    """
    config = {**CONFIGS[name], "num_hidden_layers": kept_layers(name, layers)}
    return write_checkpoint(out, config, seed=seed, progress=progress)


def write_checkpoint(out: Path, config: dict[str, Any], *, seed: int, progress: Callable[[int, int], None]) -> int:
    """Write a checkpoint of random weights into the new folder `out`; returns its bytes.

    Weights are normally distributed bf16, scaled such that every matrix keeps the size of what it multiplies; norms
    are 1. A tensor depends on the seed and its place only.

    Args:
        config: as in `CONFIGS`.
        progress: called with the bytes written so far and in all.

    Raises:
        StorageError: `out` exists, can't be written or is too small.
    """
    config = {**config, "torch_dtype": "bfloat16"}
    if out.exists():
        raise StorageError(f"{out} exists: name a new folder")
    tensors = checkpoint_tensors(config)
    total = sum(map(_bytes, tensors))
    check_room([Room(out, total, "the checkpoint")], remedy="choose another folder or fewer --layers")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write_weights(partial, tensors, seed, progress)
        write_texts(partial, config)
        partial.rename(out)
    except OSError as error:
        raise StorageError(f"can't write {out}: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return total


def _bytes(tensor: Tensor) -> int:
    return _BF16_BYTES * math.prod(tensor.shape)


def _shards(tensors: list[Tensor]) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    used = 0
    for tensor in tensors:
        if shards[-1] and used + _bytes(tensor) > SHARD_BYTES:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += _bytes(tensor)
    return shards


def _write_weights(folder: Path, tensors: list[Tensor], seed: int, progress: Callable[[int, int], None]) -> None:
    shards, total, done, place = _shards(tensors), sum(map(_bytes, tensors)), 0, 0
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with atomic_write(path) as file:
            file.write(encode_header(TensorRef(t.name, path, "BF16", t.shape, 0) for t in shard))
            for tensor in shard:
                weight_map[tensor.name] = path.name
                for piece in tensor_values(tensor, seed, place):
                    file.write(piece)
                    done += len(piece)
                    progress(done, total)
                place += 1
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def tensor_values(tensor: Tensor, seed: int, place: int) -> Iterator[bytes]:
    """The bf16 bytes of a tensor, piece by piece: normally distributed, or ones if it has one dimension.

    Args:
        seed: of all tensors.
        place: number of the tensor, which makes its values its own.
    """
    count = math.prod(tensor.shape)
    rng = np.random.default_rng([seed, place])
    for first in range(0, count, _PIECE):
        size = min(_PIECE, count - first)
        if len(tensor.shape) == 1:
            values = np.ones(size, np.float32)
        else:
            values = rng.standard_normal(size, np.float32) * np.float32(tensor.shape[1] ** -0.5)
        yield (values.view(np.uint32) >> 16).astype("<u2").tobytes()


def vocabulary_of(config: dict[str, Any]) -> dict[str, bool]:
    """The tokens of a model with this configuration, by id: bytes, the two special ones, and unused ones.

    Returns:
        Whether each token is special; the last special one ends answers.
    """
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    unused = (f"<|unused_{i}|>" for i in range(config["vocab_size"] - len(letters) - len(_SPECIAL)))
    return {piece: piece in _SPECIAL for piece in (*letters, *_SPECIAL, *unused)}


def write_texts(folder: Path, config: dict[str, Any]) -> None:
    """Write config.json and a tokenizer of bytes for a model with this configuration."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {piece: id for id, piece in enumerate(vocabulary_of(config))}
    tokenizer: Any = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in _SPECIAL])
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    end = _SPECIAL[1]
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "chat_template": TEMPLATE},
    )
    _write_json(folder / "config.json", {**config, "eos_token_id": vocabulary[end]})


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
