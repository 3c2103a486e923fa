"""The shapes of models that have a twin. Pure.

Source of the dimensions: config.json of mistralai/Mixtral-8x7B-Instruct-v0.1 and of Qwen/Qwen3-30B-A3B.
"""

from typing import Any, Literal, NamedTuple

from bs_coordinator.placement.shapes import NAMED

TwinName = Literal["mixtral-8x7b", "qwen3-30b-a3b"]

_MORE: dict[TwinName, dict[str, Any]] = {
    "mixtral-8x7b": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "intermediate_size": 6144,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    },
}
"""What config.json says beyond the sizes in `NAMED`."""
CONFIGS: dict[TwinName, dict[str, Any]] = {name: {**NAMED[name], **more} for name, more in _MORE.items()}


class Tensor(NamedTuple):
    """A tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]


def kept_layers(name: TwinName, layers: int | None) -> int:
    """The number of a twin's layers; None for all.

    Raises:
        ValueError: the model does not have so many.
    """
    every: int = CONFIGS[name]["num_hidden_layers"]
    kept = layers or every
    if not 1 <= kept <= every:
        raise ValueError(f"{name} has {every} layers, not {layers}: choose fewer --layers")
    return kept


def layer_tensors(config: dict[str, Any], layer: int) -> list[Tensor]:
    """The tensors of one layer by their names on disk."""
    prefix = f"model.layers.{layer}"
    hidden, heads, kv_heads = (config[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    head = config.get("head_dim", hidden // heads)
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (heads * head, hidden),
        "self_attn.k_proj.weight": (kv_heads * head, hidden),
        "self_attn.v_proj.weight": (kv_heads * head, hidden),
        "self_attn.o_proj.weight": (hidden, heads * head),
    }
    if config["model_type"] == "qwen3_moe":
        shapes |= {f"self_attn.{of}_norm.weight": (head,) for of in "qk"}
        moe, experts, inner = "mlp", config["num_experts"], config["moe_intermediate_size"]
        gate, up, down = "gate_proj", "up_proj", "down_proj"
    else:
        moe, experts, inner = "block_sparse_moe", config["num_local_experts"], config["intermediate_size"]
        gate, up, down = "w1", "w3", "w2"
    shapes[f"{moe}.gate.weight"] = (experts, hidden)
    for expert in range(experts):
        own = f"{moe}.experts.{expert}"
        shapes |= {
            f"{own}.{gate}.weight": (inner, hidden),
            f"{own}.{up}.weight": (inner, hidden),
            f"{own}.{down}.weight": (hidden, inner),
        }
    return [Tensor(f"{prefix}.{name}", shape) for name, shape in shapes.items()]


def checkpoint_tensors(config: dict[str, Any]) -> list[Tensor]:
    """All tensors of a checkpoint, layer by layer."""
    vocabulary = (config["vocab_size"], config["hidden_size"])
    layers = [tensor for i in range(config["num_hidden_layers"]) for tensor in layer_tensors(config, i)]
    return [
        Tensor("model.embed_tokens.weight", vocabulary),
        *layers,
        Tensor("model.norm.weight", vocabulary[1:]),
        Tensor("lm_head.weight", vocabulary),
    ]
