"""Small random Mixtral checkpoints with a tokenizer, saved by transformers itself, and ways to break them."""

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
    from tokenizers import Tokenizer, models
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
    vocabulary = {"<unk>": 0} | {f"w{i}": i for i in range(1, VOCABULARY)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    return model


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
