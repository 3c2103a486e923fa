"""A Mixtral checkpoint's config.json: dimensions of the model, checked before anything is computed from them."""

from pathlib import Path
from typing import Any, NamedTuple

from exporter.checkpoint.families import Family
from exporter.checkpoint.source_file import parse_json, read_bytes
from exporter.errors import CheckpointError
from wire.manifest import Dims

_CONFIG_KEYS = {
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "top_k": "num_experts_per_tok",
    "vocab": "vocab_size",
    "max_positions": "max_position_embeddings",
}
# Defaults of MixtralConfig.
_DEFAULT_HEADS, _DEFAULT_KEY_VALUE_HEADS = 32, 8
_MAX_COUNT = 2**31 - 1
_MAX_FLOAT = 3.4e38
_MAX_SHOWN = 60


class AttentionDims(NamedTuple):
    """Numbers of query heads and of key-value heads, and values per head."""

    heads: int
    key_value_heads: int
    head: int


def read_config(folder: Path) -> tuple[bytes, dict[str, Any]]:
    """Content of config.json, and its JSON object.

    Raises:
        CheckpointError: it is missing or not a JSON object.
    """
    raw = read_bytes(folder, "config.json")
    if raw is None:
        raise CheckpointError(f"{folder} has no config.json: it is not a Hugging Face checkpoint")
    return raw, parse_json(folder / "config.json", raw)


def model_dims(folder: Path, config: dict[str, Any], family: Family) -> Dims:
    """Dimensions of the model.

    Args:
        config: content of config.json.
        family: of the model.

    Raises:
        CheckpointError: the model can't be exported, or a number is absurd.
    """
    if config.get("quantization_config"):
        raise CheckpointError(f"{folder} is already quantised: give the original bf16, fp16 or fp32 checkpoint")
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{folder} has hidden_act {config['hidden_act']!r}, only 'silu' is supported")
    path = folder / "config.json"
    keys = {**_CONFIG_KEYS, "experts": family.experts_key, "intermediate": family.intermediate_key}
    values = {ours: _count(path, config, theirs) for ours, theirs in keys.items()}
    if values["top_k"] > values["experts"]:
        raise CheckpointError(
            f"{path}: num_experts_per_tok {values['top_k']} exceeds {family.experts_key} {values['experts']}"
        )
    for key in ("rms_norm_eps", "rope_theta"):
        value = config.get(key, 1)
        # Not isfinite alone: it fails on integers beyond the range of a float.
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MAX_FLOAT:
            raise CheckpointError(f"{path}: {key} is {_shown(value)}, a positive number expected")
    try:
        return Dims(**values)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def attention_dims(folder: Path, config: dict[str, Any]) -> AttentionDims:
    """Dimensions of the attention in a checkpoint's config.

    Args:
        config: content of config.json.

    Raises:
        CheckpointError: they are no positive numbers, or don't fit together.
    """
    path = folder / "config.json"
    hidden = _count(path, config, "hidden_size")
    heads = _count(path, config, "num_attention_heads", _DEFAULT_HEADS)
    shared = config.get("num_key_value_heads", _DEFAULT_KEY_VALUE_HEADS)
    key_value_heads = heads if shared is None else _count(path, config, "num_key_value_heads", shared)
    if heads % key_value_heads:
        raise CheckpointError(
            f"{path}: num_attention_heads {heads} is not a multiple of num_key_value_heads {key_value_heads}"
        )
    if config.get("head_dim") is not None:
        head = _count(path, config, "head_dim")
    elif hidden % heads:
        raise CheckpointError(f"{path}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    else:
        head = hidden // heads
    if head % 2:
        raise CheckpointError(f"{path}: heads of {head} values: rotary embeddings need an even number")
    if config.get("sliding_window") is not None:
        _count(path, config, "sliding_window")
    return AttentionDims(heads, key_value_heads, head)


def check_token_ids(path: Path, config: dict[str, Any], vocab: int) -> None:
    """Check the special tokens that config.json or generation_config.json names.

    Args:
        path: of the file.
        config: its content.
        vocab: number of embeddings.

    Raises:
        CheckpointError: one is no token of the model.
    """
    for key in ("bos_token_id", "eos_token_id"):
        value = config.get(key)
        for id in value if isinstance(value, list) else [] if value is None else [value]:
            if not isinstance(id, int) or isinstance(id, bool) or not 0 <= id < vocab:
                raise CheckpointError(f"{path}: {key} is {_shown(value)}, ids from 0 to {vocab - 1} expected")


def _count(path: Path, config: dict[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{path}: {key} is {_shown(value)}, a positive number expected")
    if value > _MAX_COUNT:
        raise CheckpointError(f"{path}: {key} is {_shown(value)}, at most {_MAX_COUNT} is possible")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"
