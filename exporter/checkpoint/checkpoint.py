"""Checks a Hugging Face Mixtral folder: dimensions, the place of every expert, what belongs to the trunk.

Only config.json and headers are read here, no tensors.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from exporter.checkpoint.safetensors_file import SafetensorsFile, TensorRef, read_header
from exporter.errors import CheckpointError
from wire.experts import ExpertId
from wire.manifest import Dims, Source

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
READABLE_DTYPES = ("BF16", "F16", "F32")

_CONFIG_KEYS = {
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "layers": "num_hidden_layers",
    "experts": "num_local_experts",
    "top_k": "num_experts_per_tok",
    "vocab": "vocab_size",
    "max_positions": "max_position_embeddings",
}


class ExpertTensors(NamedTuple):
    """The three matrices of one expert, in the order in which an export reads them.

    w1 and w3 are [intermediate, hidden], w2 is [hidden, intermediate]; y = w2 (silu(w1 x) · w3 x).
    """

    w1: TensorRef
    w3: TensorRef
    w2: TensorRef

    @property
    def bytes(self) -> int:
        """Bytes of the three matrices."""
        return self.w1.bytes + self.w3.bytes + self.w2.bytes


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose config and headers are valid.

    Attributes:
        folder: of the checkpoint.
        dims: dimensions of the model.
        source: name and hashes, for the manifest.
        experts: the tensors of each expert.
        trunk: tensors that belong to no expert, in file order.
    """

    folder: Path
    dims: Dims
    source: Source
    experts: dict[ExpertId, ExpertTensors]
    trunk: tuple[TensorRef, ...]

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
    raw_config, config = _read_config(folder)
    dims = _dims(folder, config)
    files = _read_files(folder)
    tensors = {name: ref for file in files for name, ref in file.tensors.items()}
    experts = _find_experts(folder, tensors, dims)
    in_experts = {ref.name for trio in experts.values() for ref in trio}
    trunk = tuple(ref for name, ref in tensors.items() if name not in in_experts)
    _check_trunk(folder, tensors, dims, tied=bool(config.get("tie_word_embeddings", False)))
    dtypes = sorted({ref.dtype for trio in experts.values() for ref in trio})
    source = Source(
        name=folder.resolve().name,
        config_sha256=hashlib.sha256(raw_config).hexdigest(),
        header_sha256={file.path.name: file.header_sha256 for file in files},
        dtype=",".join(dtypes),
    )
    return Checkpoint(folder, dims, source, experts, trunk)


def _read_config(folder: Path) -> tuple[bytes, dict[str, Any]]:
    path = folder / "config.json"
    try:
        raw = path.read_bytes()
        config = json.loads(raw)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no config.json: it is not a Hugging Face checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return raw, config


def _dims(folder: Path, config: dict[str, Any]) -> Dims:
    kind = config.get("model_type")
    if kind != "mixtral":
        architecture = (config.get("architectures") or ["unknown"])[0]
        raise CheckpointError(
            f"{folder} holds a {architecture} (model_type {kind!r}), not a Mixtral: "
            "only model_type 'mixtral' can be cut into experts"
        )
    if config.get("quantization_config"):
        raise CheckpointError(f"{folder} is already quantised: give the original bf16, fp16 or fp32 checkpoint")
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{folder} has hidden_act {config['hidden_act']!r}, only 'silu' is supported")
    values: dict[str, int] = {}
    for ours, theirs in _CONFIG_KEYS.items():
        value = config.get(theirs)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{folder / 'config.json'}: {theirs} is {value!r}, a positive number expected")
        values[ours] = value
    if values["top_k"] > values["experts"]:
        raise CheckpointError(
            f"{folder / 'config.json'}: num_experts_per_tok {values['top_k']} exceeds "
            f"num_local_experts {values['experts']}"
        )
    return Dims(**values)


def _read_files(folder: Path) -> list[SafetensorsFile]:
    if (folder / INDEX_FILE).exists():
        return _read_shards(folder)
    if (folder / SINGLE_FILE).exists():
        return [read_header(folder / SINGLE_FILE)]
    pickles = [p.name for pattern in ("*.bin", "*.bin.index.json", "*.pt", "*.pth") for p in folder.glob(pattern)]
    if pickles:
        raise CheckpointError(
            f"{folder} holds pickled weights only ({min(pickles)}): load it with transformers and save it "
            "with save_pretrained(…), which writes safetensors"
        )
    raise CheckpointError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}")


def _read_shards(folder: Path) -> list[SafetensorsFile]:
    path = folder / INDEX_FILE
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        placed = {str(name): str(shard) for name, shard in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path} is not a valid safetensors index") from None
    shards = sorted(set(placed.values()))
    if outside := [s for s in shards if Path(s).name != s]:
        raise CheckpointError(f"{path} names a file outside its folder: {outside[0]!r}")
    if missing := [s for s in shards if not (folder / s).exists()]:
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


def _find_experts(folder: Path, tensors: dict[str, TensorRef], dims: Dims) -> dict[ExpertId, ExpertTensors]:
    if any(name.endswith(".mlp.experts.gate_up_proj") for name in tensors):
        raise CheckpointError(
            f"{folder} holds fused experts (gate_up_proj): save it with transformers' save_pretrained(…), "
            "which writes one tensor per expert"
        )
    wide, tall = (dims.intermediate, dims.hidden), (dims.hidden, dims.intermediate)
    experts = {}
    for layer in range(dims.layers):
        for expert in range(dims.experts):
            prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
            trio = ExpertTensors(
                w1=_tensor(folder, tensors, f"{prefix}.w1.weight", wide),
                w3=_tensor(folder, tensors, f"{prefix}.w3.weight", wide),
                w2=_tensor(folder, tensors, f"{prefix}.w2.weight", tall),
            )
            for ref in trio:
                if ref.dtype not in READABLE_DTYPES:
                    raise CheckpointError(
                        f"tensor '{ref.name}' is {ref.dtype}: only {', '.join(READABLE_DTYPES)} can be exported"
                    )
            experts[ExpertId(layer, expert)] = trio
    return experts


def _tensor(folder: Path, tensors: dict[str, TensorRef], name: str, shape: tuple[int | None, ...]) -> TensorRef:
    """The tensor `name`, after a check of its shape; None in `shape` allows any size."""
    ref = tensors.get(name)
    if ref is None:
        raise CheckpointError(f"{folder} lacks tensor '{name}': its files don't fit its config.json")
    if len(ref.shape) != len(shape) or any(w is not None and w != n for n, w in zip(ref.shape, shape, strict=True)):
        wanted = [s if s is not None else "any" for s in shape]
        raise CheckpointError(f"tensor '{name}' has shape {list(ref.shape)}, config.json asks for {wanted}")
    return ref


def _check_trunk(folder: Path, tensors: dict[str, TensorRef], dims: Dims, *, tied: bool) -> None:
    d = dims.hidden
    wanted: dict[str, tuple[int | None, ...]] = {
        "model.embed_tokens.weight": (dims.vocab, d),
        "model.norm.weight": (d,),
    }
    if not tied:
        wanted["lm_head.weight"] = (dims.vocab, d)
    for layer in range(dims.layers):
        prefix = f"model.layers.{layer}"
        wanted[f"{prefix}.input_layernorm.weight"] = (d,)
        wanted[f"{prefix}.post_attention_layernorm.weight"] = (d,)
        wanted[f"{prefix}.block_sparse_moe.gate.weight"] = (dims.experts, d)
        for projection in ("q_proj", "k_proj", "v_proj"):
            wanted[f"{prefix}.self_attn.{projection}.weight"] = (None, d)
        wanted[f"{prefix}.self_attn.o_proj.weight"] = (d, None)
    for name, shape in wanted.items():
        _tensor(folder, tensors, name, shape)
