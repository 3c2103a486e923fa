"""Writes a twin as a GGUF file for llama.cpp, in q4_0, tensor by tensor in several processes.

Types are those that `llama-quantize` gives such a model for q4_0: the head in q6_K, keys and values of eight experts in
q8_0, gates and norms in fp32. Codes are random, and not those of the twin's bundle: same shape, another model.
"""

import logging
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from common.disk_space import Room, check_room
from common.errors import StorageError
from common.files import atomic_write
from common.parent_death import end_with_parent
from testbed.twin.quantised import draw_rows, row_bytes
from testbed.twin.shapes import CONFIGS, TwinName, checkpoint_tensors, kept_layers
from testbed.twin.write import TEMPLATE, vocabulary_of

_ARCHITECTURES = {"mixtral": gguf.MODEL_ARCH.LLAMA, "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE}
_PIECE = 1 << 25
"""Values drawn at once."""
_NEVER = "ÿ ÿ"
"""A merge of two bytes that are in no UTF-8 text: llama.cpp wants a list of merges that is not empty."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of the file; the last dimension of `shape` is that of a row."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType

    @property
    def rows(self) -> int:
        """Number of rows."""
        return math.prod(self.shape[:-1])

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return self.rows * row_bytes(self.kind, self.shape[-1])


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows to draw and to write at a place of the file; small enough to be sent to another process."""

    path: Path
    tensor: GgufTensor
    number: int
    first: int
    rows: int
    offset: int
    seed: int


def write_twin_gguf(
    out: Path, name: TwinName, *, layers: int | None, seed: int, jobs: int, progress: Callable[[int, int], None]
) -> int:
    """Write a twin to the new file `out`; returns the bytes of its weights.

    Args:
        layers: number of layers; None for all.
        jobs: processes, each of which takes up to 0.2 GB of RAM; with 1, this process does all the work.
        progress: called with the bytes written so far and in all.

    Raises:
        StorageError: `out` exists, can't be written or is too small.
        ValueError: the model does not have so many layers.
    """
    config = {**CONFIGS[name], "num_hidden_layers": kept_layers(name, layers)}
    if out.exists():
        raise StorageError(f"{out} exists: name a new file")
    tensors = gguf_tensors(config)
    total = sum(tensor.bytes for tensor in tensors)
    check_room([Room(out, total, "the model")], remedy="choose another folder or fewer --layers")
    with atomic_write(out) as file:
        path = Path(file.name)
        pieces = _pieces(path, tensors, _write_header(path, name, config, tensors), seed)
        done = 0
        for size in _drawn(pieces, jobs):
            done += size
            progress(done, total)
    return total


def gguf_tensors(config: dict[str, Any]) -> list[GgufTensor]:
    """The tensors of the file, of which each holds the same matrix of all experts of a layer."""
    experts = config.get("num_experts") or config["num_local_experts"]
    architecture = _ARCHITECTURES[config["model_type"]]
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    found: dict[str, GgufTensor] = {}
    for tensor in checkpoint_tensors(config):
        before, its, after = tensor.name.partition(".experts.")
        source = f"{before}{its}{after.partition('.')[2]}" if its else tensor.name
        name = names.get_name(source, try_suffixes=(".weight",))
        if name is None:
            raise ValueError(f"{source} has no name in GGUF files")
        shape = (experts, *tensor.shape) if its else tensor.shape
        found[name] = GgufTensor(name, shape, _kind(name, shape, experts))
    return list(found.values())


def _kind(name: str, shape: tuple[int, ...], experts: int) -> GGMLQuantizationType:
    last = name.split(".")[-2]
    if len(shape) == 1 or last == "ffn_gate_inp":
        return GGMLQuantizationType.F32
    if last == "output":
        # Its blocks have 256 values.
        return GGMLQuantizationType.Q8_0 if shape[-1] % 256 else GGMLQuantizationType.Q6_K
    if experts == 8 and last in ("attn_k", "attn_v"):
        return GGMLQuantizationType.Q8_0
    return GGMLQuantizationType.Q4_0


def _write_header(path: Path, name: TwinName, config: dict[str, Any], tensors: list[GgufTensor]) -> list[int]:
    """Write all but the weights; returns where each tensor begins."""
    logging.getLogger("gguf").setLevel(logging.WARNING)  # it reports the temporary file
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[_ARCHITECTURES[config["model_type"]]])
    heads = config["num_attention_heads"]
    head = config.get("head_dim", config["hidden_size"] // heads)
    writer.add_name(f"{name} twin")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_tokenizer(writer, config)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, raw_dtype=tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    offsets = [gguf.GGUFWriter.ggml_pad(path.stat().st_size, writer.data_alignment)]
    for tensor in tensors:
        offsets.append(offsets[-1] + gguf.GGUFWriter.ggml_pad(tensor.bytes, writer.data_alignment))
    os.truncate(path, offsets[-1])
    return offsets[:-1]


def _add_tokenizer(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """The twin's own tokenizer of bytes."""
    vocabulary = vocabulary_of(config)
    kinds = [gguf.TokenType.CONTROL if special else gguf.TokenType.NORMAL for special in vocabulary.values()]
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(list(vocabulary))
    writer.add_token_types(kinds)
    writer.add_token_merges([_NEVER])
    end = [id for id, special in enumerate(vocabulary.values()) if special][-1]
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def _pieces(path: Path, tensors: list[GgufTensor], offsets: list[int], seed: int) -> list[_Piece]:
    pieces = []
    for number, (tensor, offset) in enumerate(zip(tensors, offsets, strict=True)):
        columns = tensor.shape[-1]
        step = max(1, _PIECE // columns)
        for first in range(0, tensor.rows, step):
            at = offset + first * row_bytes(tensor.kind, columns)
            pieces.append(_Piece(path, tensor, number, first, min(step, tensor.rows - first), at, seed))
    return pieces


def _drawn(pieces: list[_Piece], jobs: int) -> Iterator[int]:
    """Draw and write all pieces; yields the bytes of each."""
    if jobs == 1:
        yield from map(_draw, pieces)
        return
    # spawn, because a fork would inherit BLAS's threads in an undefined state.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=end_with_parent) as pool:
        try:
            for future in as_completed([pool.submit(_draw, piece) for piece in pieces]):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _draw(piece: _Piece) -> int:
    tensor = piece.tensor
    if len(tensor.shape) == 1:
        data = np.ones(tensor.shape, np.float32).view(np.uint8)
    else:
        rng = np.random.Generator(np.random.SFC64([piece.seed, piece.number, piece.first]))
        data = draw_rows(rng, tensor.kind, piece.rows, tensor.shape[-1])
    with piece.path.open("r+b") as file:
        file.seek(piece.offset)
        file.write(data.data)
    return data.size
