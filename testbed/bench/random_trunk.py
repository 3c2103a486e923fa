"""Trunks of Mixtral-8x7B's dimensions with random weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS, SIZE, VOCABULARY = 32, 4096, 32000
_KEY_VALUE_SIZE, _EXPERTS = 1024, 8
_CONFIG = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "vocab_size": VOCABULARY, "hidden_size": SIZE,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": _EXPERTS,
    "num_experts_per_tok": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
    "sliding_window": None, "tie_word_embeddings": False,
}  # fmt: skip


def write_random_trunk(folder: Path, *, layers: int = LAYERS, device: str = "cuda") -> int:
    """Write the `trunk/` folder of a bundle, in bf16.

    Args:
        layers: fewer than the model has make a cut.
        device: that draws the numbers.

    Returns:
        The bytes that each token reads: all but the embedding's.
    """
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(shape, generator=generator, device=device)).to(torch.bfloat16).cpu()

    tensors = {"model.embed_tokens.weight": random(VOCABULARY, SIZE), "lm_head.weight": random(VOCABULARY, SIZE)}
    tensors["model.norm.weight"] = torch.ones(SIZE, dtype=torch.bfloat16)
    for i in range(layers):
        at = f"model.layers.{i}"
        for part, rows in (("q", SIZE), ("k", _KEY_VALUE_SIZE), ("v", _KEY_VALUE_SIZE), ("o", SIZE)):
            tensors[f"{at}.self_attn.{part}_proj.weight"] = random(rows, SIZE)
        tensors[f"{at}.block_sparse_moe.gate.weight"] = random(_EXPERTS, SIZE)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{norm}.weight"] = torch.ones(SIZE, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_CONFIG | {"num_hidden_layers": layers}))
    return sum(t.nbytes for name, t in tensors.items() if name != "model.embed_tokens.weight")
