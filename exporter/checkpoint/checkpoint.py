"""Checks a Hugging Face Mixtral folder: dimensions, the place of every expert, what belongs to the trunk.

Only config.json and headers are read here, no tensors.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.checkpoint.families import Family, model_family
from exporter.checkpoint.matrices import FLOAT_DTYPES, ExpertTensors, matrix_ref
from exporter.checkpoint.model_config import AttentionDims, attention_dims, check_token_ids, model_dims, read_config
from exporter.checkpoint.safetensors_file import SafetensorsFile, TensorRef, read_header
from exporter.checkpoint.source_file import locate, read_json, source_name
from exporter.errors import CheckpointError
from wire.experts import ExpertId
from wire.manifest import Architecture, Dims, Source, mixtral_architecture

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose config and headers are valid.

    Attributes:
        folder: of the checkpoint.
        dims: dimensions of the model.
        architecture: of the model.
        source: name and hashes, for the manifest.
        experts: the tensors of each expert.
        trunk: the trunk's tensors, in file order.
        unknown: names of tensors that the model does not have.
    """

    folder: Path
    dims: Dims
    architecture: Architecture
    source: Source
    experts: dict[ExpertId, ExpertTensors]
    trunk: tuple[TensorRef, ...]
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
        CheckpointError: the checkpoint is missing, incomplete, damaged or not a Mixtral.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: give the folder that holds config.json")
    raw_config, config = read_config(folder)
    family = model_family(folder, config)
    dims, attention = model_dims(folder, config, family), attention_dims(folder, config)
    check_token_ids(folder / "config.json", config, dims.vocab)
    if (generation := read_json(folder, "generation_config.json")) is not None:
        check_token_ids(folder / "generation_config.json", generation, dims.vocab)
    files = _read_files(folder)
    tensors = {name: ref for file in files for name, ref in file.tensors.items()}
    experts = _find_experts(folder, tensors, dims, family)
    in_experts = {ref.name for trio in experts.values() for ref in trio.tensors}
    tied = bool(config.get("tie_word_embeddings", False))
    in_trunk = _trunk_tensors(folder, tensors, dims, attention, family, tied=tied)
    dtypes = sorted({ref.dtype for trio in experts.values() for ref in trio.matrices})
    source = Source(
        name=source_name(folder),
        config_sha256=hashlib.sha256(raw_config).hexdigest(),
        header_sha256={file.path.name: file.header_sha256 for file in files},
        dtype=",".join(dtypes),
    )
    return Checkpoint(
        folder,
        dims,
        mixtral_architecture(dims.layers),
        source,
        experts,
        trunk=tuple(ref for name, ref in tensors.items() if name in in_trunk),
        unknown=tuple(name for name in tensors if name not in in_trunk and name not in in_experts),
    )


def _read_files(folder: Path) -> list[SafetensorsFile]:
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
        placed = {str(name): str(shard) for name, shard in index["weight_map"].items()}
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path} is not a valid safetensors index") from None
    if outside := [s for s in placed.values() if Path(s).name != s]:
        raise CheckpointError(f"{path} names a file outside its folder: {outside[0]!r}")
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


def _find_experts(
    folder: Path, tensors: dict[str, TensorRef], dims: Dims, family: Family
) -> dict[ExpertId, ExpertTensors]:
    if any(name.endswith(".mlp.experts.gate_up_proj") for name in tensors):
        raise CheckpointError(
            f"{folder} holds fused experts (gate_up_proj): save it with transformers' save_pretrained(…), "
            "which writes one tensor per expert"
        )
    wide, tall = (dims.intermediate, dims.hidden), (dims.hidden, dims.intermediate)
    experts = {}
    for layer in range(dims.layers):
        for expert in range(dims.experts):
            prefix = f"model.layers.{layer}.{family.block}.experts.{expert}"
            experts[ExpertId(layer, expert)] = ExpertTensors(
                w1=matrix_ref(_tensor(folder, tensors, f"{prefix}.{family.w1}.weight", wide), wide),
                w3=matrix_ref(_tensor(folder, tensors, f"{prefix}.{family.w3}.weight", wide), wide),
                w2=matrix_ref(_tensor(folder, tensors, f"{prefix}.{family.w2}.weight", tall), tall),
            )
    return experts


def _tensor(folder: Path, tensors: dict[str, TensorRef], name: str, shape: tuple[int, ...]) -> TensorRef:
    """The tensor `name`, after a check of its shape and number format."""
    ref = tensors.get(name)
    if ref is None:
        raise CheckpointError(f"{folder} lacks tensor '{name}': its files don't fit its config.json")
    if ref.shape != shape:
        raise CheckpointError(f"tensor '{name}' has shape {list(ref.shape)}, config.json asks for {list(shape)}")
    if ref.dtype not in FLOAT_DTYPES:
        raise CheckpointError(f"tensor '{name}' is {ref.dtype}: only {', '.join(FLOAT_DTYPES)} can be exported")
    return ref


def _trunk_tensors(
    folder: Path, tensors: dict[str, TensorRef], dims: Dims, attention: AttentionDims, family: Family, *, tied: bool
) -> set[str]:
    """Names of the trunk's tensors, all of which are there with the shapes that the base station will ask for."""
    d = dims.hidden
    wanted: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (dims.vocab, d),
        "model.norm.weight": (d,),
    }
    if not tied:
        wanted["lm_head.weight"] = (dims.vocab, d)
    query, key_value = attention.heads * attention.head, attention.key_value_heads * attention.head
    for layer in range(dims.layers):
        prefix = f"model.layers.{layer}"
        wanted[f"{prefix}.input_layernorm.weight"] = (d,)
        wanted[f"{prefix}.post_attention_layernorm.weight"] = (d,)
        wanted[f"{prefix}.{family.block}.gate.weight"] = (dims.experts, d)
        wanted[f"{prefix}.self_attn.q_proj.weight"] = (query, d)
        wanted[f"{prefix}.self_attn.k_proj.weight"] = (key_value, d)
        wanted[f"{prefix}.self_attn.v_proj.weight"] = (key_value, d)
        wanted[f"{prefix}.self_attn.o_proj.weight"] = (d, query)
    for name, shape in wanted.items():
        _tensor(folder, tensors, name, shape)
    return set(wanted)
