"""Every way in which checkpoints keep experts is cut into graphs that compute what the model's own experts compute."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from exporter.bundle.bundle import export_bundle
from exporter.checkpoint.checkpoint import open_checkpoint
from exporter.checkpoint.families import FAMILIES
from exporter.errors import CheckpointError
from tests.checkpoints import HIDDEN, TINY_FAMILIES, edit_config, tiny_moe
from wire.manifest import ExpertEntry, Quantisation
from wire.probe import probe_input
from wire.tensors import Array

FP32 = Quantisation(scheme="fp32")
SINGLE = "model.safetensors"
Tensors = dict[str, torch.Tensor]


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Replace a checkpoint's tensors."""
    tensors = change(load_file(folder / SINGLE))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE, {"format": "pt"})


def fused_by_hand(folder: Path, family: str) -> Any:
    """A checkpoint with the names and shapes of the model in memory, as a state dict saved by hand has them."""
    model = tiny_moe(folder, family)
    rewrite(folder, lambda _: {name: value.clone() for name, value in model.state_dict().items()})
    return model


def mxfp4(folder: Path, family: str) -> Any:
    """A checkpoint as OpenAI published gpt-oss: random 4-bit codes and exponents of a useful size."""
    model = tiny_moe(folder, family)
    generator = torch.Generator().manual_seed(3)

    def packed(tensors: Tensors) -> Tensors:
        for name in [name for name in tensors if name.endswith("_proj")]:
            experts, inputs, outputs = tensors.pop(name).shape
            shape = (experts, outputs, inputs // 32)
            codes = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
            exponents = torch.randint(122, 126, shape, dtype=torch.uint8, generator=generator)
            tensors |= {f"{name}_blocks": codes, f"{name}_scales": exponents}
            values = convert_moe_packed_tensors(codes, exponents, dtype=torch.float32)
            model.get_parameter(name).data.copy_(values)
        return tensors

    rewrite(folder, packed)
    edit_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return model


def expert_outputs(bundle: Path, entry: ExpertEntry, x: Array) -> Array:
    session = onnxruntime.InferenceSession(str(bundle / entry.files[0].path), providers=["CPUExecutionProvider"])
    outputs: Array = session.run(["y"], {"x": x})[0]
    return outputs


@pytest.mark.parametrize(
    ("family", "save", "layers"),
    [
        ("minimax_m2", tiny_moe, (0, 1, 2)),
        ("qwen3_moe", tiny_moe, (0, 2)),
        ("lfm2_moe", tiny_moe, (1, 2)),
        ("jamba", tiny_moe, (0, 2)),
        ("granitemoehybrid", tiny_moe, (0, 1, 2)),
        ("gpt_oss", tiny_moe, (0, 1, 2)),
        ("gpt_oss", mxfp4, (0, 1, 2)),
        ("qwen3_moe", fused_by_hand, (0, 2)),
    ],
)
def test_experts_compute_what_the_models_own_experts_do(
    family: str, save: Callable[[Path, str], Any], layers: tuple[int, ...], tmp_path: Path
) -> None:
    model = save(tmp_path / "checkpoint", family)
    out = tmp_path / "out"
    result = export_bundle(tmp_path / "checkpoint", out, FP32, jobs=1)
    manifest = result.manifest
    assert (manifest.architecture.family, manifest.architecture.layers) == (family, layers)
    assert (manifest.dims.layers, manifest.dims.experts, manifest.dims.top_k) == (len(layers), 8, 2)
    assert result.lost == ()
    x = probe_input(HIDDEN, 3)
    modules = [module for module in model.modules() if hasattr(module, "_apply_gate")]
    for entry in manifest.experts:
        index = torch.full((3, 1), entry.expert)
        with torch.no_grad():
            expected = modules[entry.layer](torch.from_numpy(x), index, torch.ones(3, 1)).numpy()
        np.testing.assert_allclose(expert_outputs(out, entry, x), expected, rtol=1e-4, atol=1e-4)
    stored = load_file(tmp_path / "checkpoint" / SINGLE)
    trunk = load_file(out / "trunk" / SINGLE)
    assert all(torch.equal(value, stored[name]) for name, value in trunk.items())
    experts_bytes = sum(value.nbytes for name, value in stored.items() if name not in trunk)
    assert experts_bytes == result.source_bytes


def test_all_families_have_a_tiny_model() -> None:
    assert set(FAMILIES) == set(TINY_FAMILIES)


def test_fp8_of_deepseek_is_dequantised_as_transformers_does_it(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    tiny_moe(folder, "deepseek_v3", "bfloat16")
    expected: Tensors = {}

    def quantised(tensors: Tensors) -> Tensors:
        found: Tensors = {}
        for name, value in tensors.items():
            if value.ndim == 2 and "_proj" in name:
                scale = (value.float().abs().max() / 448).reshape(1, 1)
                found[name] = (value.float() / scale).to(torch.float8_e4m3fn)
                found[f"{name}_scale_inv"] = scale
                expected[name] = found[name].float() * scale
            else:
                found[name] = value
        return found

    rewrite(folder, quantised)
    edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    manifest = export_bundle(folder, tmp_path / "out", FP32, layers=[0], jobs=1).manifest
    assert manifest.source.dtype == "F8_E4M3"
    trunk = load_file(tmp_path / "out/trunk" / SINGLE)
    name = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(trunk[name], expected[name].bfloat16())
    assert not [name for name in trunk if "scale" in name or ".experts." in name]
    assert "quantization_config" not in json.loads((tmp_path / "out/trunk/config.json").read_text())
    x = torch.from_numpy(probe_input(HIDDEN, 3))
    for entry in manifest.experts[:2]:
        gate, up, down = (
            expected[f"model.layers.1.mlp.experts.{entry.expert}.{name}_proj.weight"] for name in ("gate", "up", "down")
        )
        right = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
        np.testing.assert_allclose(expert_outputs(tmp_path / "out", entry, x.numpy()), right, rtol=1e-4, atol=1e-4)


def test_layers_for_predicting_several_tokens_are_left_out(tmp_path: Path) -> None:
    tiny_moe(tmp_path, "deepseek_v3")

    def with_another_layer(tensors: Tensors) -> Tensors:
        return tensors | {
            name.replace(".2.", ".3.", 1): value.clone() for name, value in tensors.items() if ".layers.2." in name
        }

    before = open_checkpoint(tmp_path)
    rewrite(tmp_path, with_another_layer)
    found = open_checkpoint(tmp_path)
    assert (found.dims, found.architecture) == (before.dims, before.architecture)
    assert found.unknown
    assert all(name.startswith("model.layers.3.") for name in found.unknown)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("minimax_m2", "model.layers.1.block_sparse_moe.e_score_correction_bias"),
        ("granitemoe", "model.layers.2.block_sparse_moe.router.layer.weight"),
        ("qwen2_moe", "model.layers.0.mlp.shared_expert_gate.weight"),
    ],
)
def test_a_trunk_that_lacks_a_tensor(family: str, name: str, tmp_path: Path) -> None:
    tiny_moe(tmp_path, family)
    rewrite(tmp_path, lambda tensors: {key: value for key, value in tensors.items() if key != name})
    with pytest.raises(CheckpointError, match=rf"lacks tensor '{name}': its files don't fit its config.json"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt_oss", {"num_local_experts": 9}, r"router.bias' has shape \[8\], config.json asks for \[9\]"),
        ("gpt_oss", {"intermediate_size": 64}, r"gate_up_proj' has shape \[8, 64, 192\], config.json asks for"),
        ("granitemoe", {"hidden_size": -1}, "hidden_size is -1, a positive number expected"),
        ("qwen3_moe", {"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000, at most 1000 is possible"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "config.json: top-9 of 8 experts"),
        ("qwen3_moe", {"moe_intermediate_size": "32"}, "moe_intermediate_size is '32', a positive number expected"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}, "describes a model without experts"),
        ("deepseek_v3", {"kv_lora_rank": -3}, "transformers can't use its config.json"),
    ],
)
def test_absurd_configurations(family: str, changes: dict[str, object], message: str, tmp_path: Path) -> None:
    tiny_moe(tmp_path, family)
    edit_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(tmp_path)
    assert "\n" not in str(error.value)
