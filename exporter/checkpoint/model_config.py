"""A checkpoint's config.json, checked before a model is built from it."""

from pathlib import Path
from typing import Any, NamedTuple

from exporter.checkpoint.families import FAMILIES, model_family
from exporter.checkpoint.matrices import FP8_BLOCK
from exporter.checkpoint.source_file import parse_json, read_bytes, read_json
from exporter.errors import CheckpointError

_COUNTS = ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings")
# These may be missing or null, where transformers has a default, and lists, where layers differ.
_OPTIONAL_COUNTS = (
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_experts_per_tok",
    "moe_k",
    "moe_topk",
)
_POSITIVE_IN_ROPE = (
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "short_factor",
    "long_factor",
    "attention_factor",
    "original_max_position_embeddings",
)
_MAX_COUNT = 2**31 - 1
_MAX_LAYERS = 1000
_MAX_FLOAT = 3.4e38
_MAX_SHOWN = 60


class ModelConfig(NamedTuple):
    """What config.json says that is needed to read the weights.

    Attributes:
        raw: content of the file.
        kind: `model_type`, one of `FAMILIES`.
        quantised: `mxfp4` or `fp8`; None if the weights are not quantised.
    """

    raw: bytes
    kind: str
    quantised: str | None


def read_model_config(folder: Path) -> ModelConfig:
    """Read config.json, and check the numbers that a model is built from.

    Raises:
        CheckpointError: it is missing or not a JSON object, a number in it is absurd, the model is of an unknown
            family, or its weights are quantised in a way that can't be read exactly.
    """
    raw, path = read_bytes(folder, "config.json"), folder / "config.json"
    if raw is None:
        raise CheckpointError(f"{folder} has no config.json: it is not a Hugging Face checkpoint")
    config = parse_json(path, raw)
    kind = model_family(folder, config)
    quantised = _quantised(folder, config, FAMILIES[kind].example)
    _check_numbers(path, config)
    _check_token_ids(path, config, config["vocab_size"])
    if (generation := read_json(folder, "generation_config.json")) is not None:
        _check_token_ids(folder / "generation_config.json", generation, config["vocab_size"])
    return ModelConfig(raw, kind, quantised)


def _check_numbers(path: Path, config: dict[str, Any]) -> None:
    for key in _COUNTS:
        _check_count(path, key, config.get(key))
    if config["num_hidden_layers"] > _MAX_LAYERS:
        raise CheckpointError(
            f"{path}: num_hidden_layers is {_shown(config['num_hidden_layers'])}, at most {_MAX_LAYERS} is possible"
        )
    for key in _OPTIONAL_COUNTS:
        value = config.get(key)
        for one in value if isinstance(value, list) else () if value is None else (value,):
            _check_count(path, key, one)
    if config.get("sliding_window") is not None and config.get("use_sliding_window", True):
        _check_count(path, "sliding_window", config["sliding_window"])
    for key in ("rms_norm_eps", "rope_theta"):
        if key in config:
            _check_positive(path, key, config[key])
    for where in ("rope_parameters", "rope_scaling"):
        _check_rope(path, where, config.get(where))


def _check_rope(path: Path, where: str, rope: object) -> None:
    """Check the parameters of a rotary embedding, or of one for each kind of layer: transformers only warns."""
    if not isinstance(rope, dict):
        return
    for parameters in (rope, *(inner for inner in rope.values() if isinstance(inner, dict))):
        for key in _POSITIVE_IN_ROPE:
            value = parameters.get(key)
            for one in value if isinstance(value, list) else () if value is None else (value,):
                _check_positive(path, f"{where}.{key}", one)


def _check_positive(path: Path, key: str, value: object) -> None:
    # Not isfinite alone: it fails on integers beyond the range of a float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MAX_FLOAT:
        raise CheckpointError(f"{path}: {key} is {_shown(value)}, a positive number expected")


def _check_token_ids(path: Path, config: dict[str, Any], vocab: int) -> None:
    """Check the special tokens that config.json or generation_config.json names."""
    for key in ("bos_token_id", "eos_token_id"):
        value = config.get(key)
        for id in value if isinstance(value, list) else [] if value is None else [value]:
            if not isinstance(id, int) or isinstance(id, bool) or not 0 <= id < vocab:
                raise CheckpointError(f"{path}: {key} is {_shown(value)}, ids from 0 to {vocab - 1} expected")


def _quantised(folder: Path, config: dict[str, Any], example: str) -> str | None:
    found = config.get("quantization_config")
    if not found:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else None
    if method == "mxfp4" or (method == "fp8" and found.get("weight_block_size") == list(FP8_BLOCK)):
        return str(method)
    raise CheckpointError(
        f"{folder} is already quantised ({_shown(method)}), which can't be read exactly: download the original "
        f"checkpoint in bf16, fp16 or fp32, such as {example}"
    )


def _check_count(path: Path, key: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{path}: {key} is {_shown(value)}, a positive number expected")
    if value > _MAX_COUNT:
        raise CheckpointError(f"{path}: {key} is {_shown(value)}, at most {_MAX_COUNT} is possible")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"
