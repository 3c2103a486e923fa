"""Small random checkpoints with a tokenizer, saved by transformers itself, and ways to break them."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

HIDDEN, INTERMEDIATE, LAYERS, EXPERTS = 64, 96, 2, 4
VOCABULARY = 48


def save_mixtral(
    folder: Path, dtype: str, *, shard_size: str = "1GB", layers: int = LAYERS, positions: int = 64
) -> Any:
    """Save a random model and return it (transformers' MixtralForCausalLM, already in `dtype`)."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=positions,
        # Weights of a size that gives outputs of the size of the inputs.
        initializer_range=0.15,
    )
    model = MixtralForCausalLM(config).to(getattr(torch, dtype)).eval()
    model.save_pretrained(folder, max_shard_size=shard_size)
    save_tokenizer(folder)
    return model


_TINY_SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "kv_lora_rank": 24,
    "q_lora_rank": 32,
    "head_dim": 8,
}
_LINEAR_ATTENTION = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
TINY_FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {"num_dense_layers": 1, "sliding_window": 16, "global_attn_every_n_layers": 2, "route_scale": 1.5},
    "deepseek_v2": _LATENT_ATTENTION | {"first_k_dense_replace": 1, "routed_scaling_factor": 2.0},
    "deepseek_v3": _LATENT_ATTENTION | {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
    "ernie4_5_moe": {},
    "flex_olmo": {},
    "glm4_moe": {"first_k_dense_replace": 1, "routed_scaling_factor": 1.8, "use_qk_norm": True},
    "glm4_moe_lite": _LATENT_ATTENTION | {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "gpt_oss": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "granitemoe": {},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba"],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
    },
    "granitemoeshared": {},
    "hunyuan_v1_moe": {},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 0,
        "use_mamba_kernels": False,
        "mamba_dt_rank": 8,
    },
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
    "minimax_m2": {"rotary_dim": 8},
    "mixtral": {},
    "olmoe": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_moe": {"mlp_only_layers": [1], "norm_topk_prob": True},
    "qwen3_next": _LINEAR_ATTENTION,
    "solar_open": {"n_shared_experts": 1},
}
"""What config.json of a tiny model of each family says beyond, or other than, `_TINY_SIZES`."""


def tiny_moe(folder: Path, family: str, dtype: str = "float32") -> Any:
    """Save a random model of three layers with eight experts in some of them, top-2, and a tokenizer.

    Tensors that are zero in a fresh model (selection biases, sinks, biases of experts) get random values, so that a
    model without them gives other logits.

    Args:
        folder: becomes a checkpoint as transformers' `save_pretrained` writes it.
        family: `model_type`, one of `TINY_FAMILIES`.

    Returns:
        The model, already in `dtype`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    blank = AutoConfig.for_model(family)
    known = {*blank.to_dict(), *blank.attribute_map}
    sizes = {key: value for key, value in _TINY_SIZES.items() if key in known}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes | TINY_FAMILIES[family]))
    model = model.to(getattr(torch, dtype)).eval()
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point() and not value.any():
                value.normal_(std=0.1)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    # Without this, transformers takes the family's own class, which adds tokens.
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return model


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of `VOCABULARY` words: `<unk>`, `w1`, `w2`, …."""
    from tokenizers import Tokenizer, models

    vocabulary = {"<unk>": 0} | {f"w{i}": i for i in range(1, VOCABULARY)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")).save(str(folder / "tokenizer.json"))


def copy_checkpoint(source: Path, target: Path) -> Path:
    """A copy that a test may break."""
    shutil.copytree(source, target)
    return target


def edit_config(folder: Path, **changes: object) -> None:
    """Change keys of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def read_raw(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_raw(path: Path, header: dict[str, Any], data: bytes) -> None:
    """A safetensors file of this header and data, sound or not."""
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def poke(path: Path, tensor: str, value: bytes) -> None:
    """Overwrite the last bytes of a tensor; the header stays as it is."""
    header, data = read_raw(path)
    end = header[tensor]["data_offsets"][1]
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - len(data) + end - len(value))
        file.write(value)


def drop_tensor(path: Path, tensor: str) -> None:
    """Remove a tensor from a safetensors file."""
    header, data = read_raw(path)
    begin, end = header.pop(tensor)["data_offsets"]
    for entry in header.values():
        if entry.get("data_offsets", [0])[0] >= end:
            entry["data_offsets"] = [offset - (end - begin) for offset in entry["data_offsets"]]
    write_raw(path, header, data[:begin] + data[end:])
