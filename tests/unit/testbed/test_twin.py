"""Twins: the exact tensors of well-known models, exported like the real ones."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from exporter.bundle.bundle import export_bundle
from exporter.checkpoint.checkpoint import open_checkpoint
from testbed.twin import shapes
from testbed.twin.shapes import CONFIGS, TwinName, checkpoint_tensors
from tests.conftest import Run
from wire.manifest import Quantisation

SMALL: dict[TwinName, dict[str, int]] = {
    "mixtral-8x7b": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "vocab_size": 320,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "qwen3-30b-a3b": {
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "num_experts": 16,
        "vocab_size": 320,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
}

PARAMETERS: dict[TwinName, int] = {"mixtral-8x7b": 46_702_792_704, "qwen3-30b-a3b": 30_532_122_624}
"""Half of `total_size` in the index of each model's checkpoint, which is in bf16."""


@pytest.mark.parametrize("name", CONFIGS)
def test_tensors_are_those_of_transformers_model(name: TwinName) -> None:
    """As many weights as the model that transformers makes of the same config.json, without allocating it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {key: value for key, value in CONFIGS[name].items() if key not in ("model_type", "architectures")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(CONFIGS[name]["model_type"], **config))
    count = sum(torch.Size(tensor.shape).numel() for tensor in checkpoint_tensors(CONFIGS[name]))
    assert count == sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_twin_is_exported_like_any_checkpoint(
    name: TwinName, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(shapes.CONFIGS, name, {**CONFIGS[name], **SMALL[name]})
    monkeypatch.setattr("testbed.twin.write.SHARD_BYTES", 200_000)
    out = tmp_path / "twin"
    made = run("testbed", "twin", name, out, "--layers", 2)
    assert made.returncode == 0, made.stderr
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    for tensor, file in index["weight_map"].items():
        with safe_open(out / file, "pt") as weights:
            values = weights.get_tensor(tensor).float()
        assert values.eq(1).all() if values.ndim == 1 else 0.5 < values.std() * values.shape[1] ** 0.5 < 1.5
    source = open_checkpoint(out)
    assert (source.dims.layers, source.dims.experts) == (2, len(source.experts) // 2)
    export_bundle(source, tmp_path / "bundle", Quantisation(scheme="int4", block=32), jobs=1)


def test_what_cannot_be_written_is_refused(tmp_path: Path, run: Run) -> None:
    (tmp_path / "there").mkdir()
    there = run("testbed", "twin", "mixtral-8x7b", tmp_path / "there", "--layers", 1)
    assert (there.returncode, "exists: name a new folder" in there.stderr) == (12, True)
    many = run("testbed", "twin", "mixtral-8x7b", tmp_path / "new", "--layers", 33)
    assert (many.returncode, "has 32 layers, not 33" in many.stderr) == (2, True)
    assert not (tmp_path / "new").exists()
