"""The second demo model, a Qwen3-MoE: its formula, its checksums, and deltas that don't belong together."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from exporter.demo_model import base as base_model
from exporter.demo_model.assembly import DEMO_MODELS, MODELS_FOLDER, assemble_demo_model
from exporter.demo_model.base import open_base
from exporter.errors import CheckpointError
from tests.conftest import Run
from tests.text_models import save_tokenizer

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 32, 48, 2, 4, 2, 8
FIRST_EXPERTS, FIRST_RANK, EXPERTS, HALF, RANK = 4, 3, 8, 24, 2

# SHA-256 of bf16 tensors of the whole model; each is made by a rule of its own. Layer 29 is the last.
CHECKSUMS = {
    "model.norm.weight": "b1c3b88d13d30d192c39ca32dfc07aa9f333844fccae2e5b34d3f3572dd6c5f4",
    "model.layers.0.mlp.experts.0.gate_proj.weight": "ed84c6f5376936714ccef02b40be65ba1d15761813fe47d6cc1fd56e6322ec79",
    "model.layers.29.mlp.experts.0.down_proj.weight": (
        "d5e207198572b1e6cb9efab650ccbe3fab5d96d9dec11dc34ef71ce09b6d80c4"
    ),
    "model.layers.29.mlp.experts.15.down_proj.weight": (
        "8ee15e9aa9536e3a8808c55e4adb762272cdb972fe65bbf7cc373482e1f49dd7"
    ),
    "model.layers.29.mlp.experts.15.gate_proj.weight": (
        "6c1ccb5930263aed0f5ebff0bbb00d2c50314033a9ca3c4a31845f5c367b70ed"
    ),
    "model.layers.29.mlp.experts.15.up_proj.weight": "49776af330c7fe9acd0113ea726f0a597db5ae0a3cf138c0a268398b628a5ee5",
    "model.layers.29.mlp.gate.weight": "8f45ff16494750264188ad992975cab38f23d10951ba300af8de4bfc8fbf13bf",
    "model.layers.29.self_attn.q_norm.weight": "51e2c5d21d3c97eb25ef4c21c0f5c53a5684c1e2b319863071541d48dc27ca3e",
    "model.layers.29.self_attn.k_proj.weight": "0239f4a3211352036d62b43b5c5acd5372b9d9d8641084625839acfa7bc2cfcd",
    "model.layers.29.self_attn.q_proj.weight": "c458b2a240ddabe19a986c04c43716a1e06fa3203b53e861f6de69f622bb8c77",
    "model.layers.29.self_attn.v_proj.weight": "d6cd48b7d3e408dfd0fe3f209c9508a27ee3765206bea14e574fa7aa0e4ca78c",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense Llama of two tiny layers."""
    folder = tmp_path_factory.mktemp("base")
    words = save_tokenizer(folder, "byte-level")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, max_position_embeddings=128,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _save_deltas(models: Path, base: Path, **config: object) -> Path:
    """Random deltas of both demo models in `models`; returns the second one's folder."""
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).mul(0.1).bfloat16()

    def factor(rows: int, width: int) -> torch.Tensor:
        return torch.randint(-127, 128, (rows, width), generator=generator, dtype=torch.int8)

    sides = {1: (HIDDEN, INNER), 2: (INNER, HIDDEN), 3: (HIDDEN, INNER)}
    first, second = {}, {"anchor_dim": torch.tensor([5, 2], dtype=torch.int32)}
    for i in range(LAYERS):
        first[f"layers.{i}.gate"] = random(FIRST_EXPERTS, HIDDEN)
        second[f"layers.{i}.gate"] = random(EXPERTS, HIDDEN)
        factors: dict[str, tuple[int, int]] = {}
        for n, (width_in, width_out) in sides.items():
            first[f"layers.{i}.a{n}"] = random(FIRST_EXPERTS * FIRST_RANK, width_in)
            first[f"layers.{i}.b{n}"] = random(FIRST_EXPERTS * FIRST_RANK, width_out)
            halved = [HALF if width == INNER else width for width in (width_in, width_out)]
            factors |= {f"a{n}": (EXPERTS * RANK, halved[0]), f"b{n}": (EXPERTS * RANK, halved[1])}
        for kind, heads in (("q", HEADS), ("k", KV_HEADS)):
            factors |= {f"a{kind}": (3, HIDDEN), f"b{kind}": (3, heads * HEAD_DIM)}
            second[f"layers.{i}.{kind}_norm"] = random(HEAD_DIM)
            second[f"layers.{i}.{kind}_anchor"] = random(HIDDEN)
        for name, shape in factors.items():
            second[f"layers.{i}.{name}"] = factor(*shape)
            second[f"layers.{i}.{name}.scale"] = torch.rand(shape[0], generator=generator).mul(0.01).half()
    folder, first_folder = models / "smol-qwen3moe-16x", models / "smol-mixtral-8x135m"
    folder.mkdir()
    first_folder.mkdir()
    save_file(first, first_folder / "delta-0.safetensors")
    save_file(second, folder / "delta.safetensors")
    llama = json.loads((base / "config.json").read_text())
    keys = ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    document = {key: llama[key] for key in (*keys, "num_hidden_layers", "max_position_embeddings", "rms_norm_eps")}
    document |= {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": EXPERTS,
        "num_experts_per_tok": 2, "moe_intermediate_size": HALF, "norm_topk_prob": True, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(document | config))
    return folder


def test_the_model_follows_the_formula(base: Path, tmp_path: Path) -> None:
    deltas = _save_deltas(tmp_path, base)
    out = assemble_demo_model(tmp_path / "m", model="qwen3-moe", base=str(base), deltas=deltas)
    (file,) = out.glob("*.safetensors")
    model, dense = load_file(file), load_file(base / "model.safetensors")
    first = {name: t.float() for name, t in load_file(tmp_path / "smol-mixtral-8x135m/delta-0.safetensors").items()}
    stored = load_file(deltas / "delta.safetensors")
    scaled = {n: t.float() * stored[f"{n}.scale"].float()[:, None] for n, t in stored.items() if f"{n}.scale" in stored}

    def equal(name: str, expected: torch.Tensor) -> None:
        torch.testing.assert_close(model.pop(name).float(), expected, rtol=2**-8, atol=1e-6)

    for i in range(LAYERS):
        layer, attention = f"model.layers.{i}", f"model.layers.{i}.self_attn"
        equal(f"{layer}.mlp.gate.weight", stored[f"layers.{i}.gate"].float())
        for kind, heads in (("q", HEADS), ("k", KV_HEADS)):
            equal(f"{attention}.{kind}_norm.weight", stored[f"layers.{i}.{kind}_norm"].float())
            low_rank = scaled[f"layers.{i}.b{kind}"].T @ scaled[f"layers.{i}.a{kind}"]
            weight = dense.pop(f"{attention}.{kind}_proj.weight") + low_rank
            for head in range(heads):
                row = HEAD_DIM * head + int(stored["anchor_dim"][i])
                weight[row] += stored[f"layers.{i}.{kind}_anchor"].float()
            equal(f"{attention}.{kind}_proj.weight", weight)
        for n, name in {1: "gate_proj", 2: "down_proj", 3: "up_proj"}.items():
            weight = dense.pop(f"{layer}.mlp.{name}.weight")
            a, b = (first[f"layers.{i}.{f}{n}"].unflatten(0, (FIRST_EXPERTS, FIRST_RANK)) for f in "ab")
            full = weight + torch.einsum("ero,eri->eoi", b, a)
            a, b = (scaled[f"layers.{i}.{f}{n}"].unflatten(0, (EXPERTS, RANK)) for f in "ab")
            for expert in range(EXPERTS):
                e, half = divmod(expert, 2)
                neurons = slice(HALF * half, HALF * (half + 1))
                part = 2 * full[e][:, neurons] if name == "down_proj" else full[e][neurons]
                equal(f"{layer}.mlp.experts.{expert}.{name}.weight", part + b[expert].T @ a[expert])
    for name, tensor in dense.items():
        assert torch.equal(model.pop(name), tensor.bfloat16()), name
    assert not model
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert type(loaded).__name__ == "Qwen3MoeForCausalLM"
    with torch.no_grad():
        assert bool(torch.isfinite(loaded(torch.tensor([[1, 5, 9]])).logits).all())


def test_the_command_makes_it_and_keeps_the_first_layers(run: Run, base: Path, tmp_path: Path) -> None:
    deltas = _save_deltas(tmp_path, base)
    args = ("demo-model", tmp_path / "m", "--model", "qwen3-moe", "--base", base, "--deltas", deltas, "--layers", 1)
    assert run("exporter", *args).returncode == 0
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"]) == ("qwen3_moe", 1)
    assert config["eos_token_id"] == json.loads((tmp_path / "m/generation_config.json").read_text())["eos_token_id"]
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
    assert not any(name.startswith("model.layers.1.") for name in index["weight_map"])


def test_a_model_that_was_made_before_is_copied(base: Path, tmp_path: Path) -> None:
    deltas = _save_deltas(tmp_path, base)

    def make(out: Path, made: Path | None, layers: int | None = None) -> tuple[dict[str, bytes], list[str]]:
        stages: list[str] = []
        assemble_demo_model(
            out, model="qwen3-moe", base=str(base), deltas=deltas, layers=layers, made=made,
            progress=lambda stage, _: stages.append(stage),
        )  # fmt: skip
        return {file.name: file.read_bytes() for file in out.iterdir()}, stages

    first, built = make(tmp_path / "cache", tmp_path / "nothing")
    assert not any("made before" in stage for stage in built)
    second, copied = make(tmp_path / "m", tmp_path / "cache")
    assert second == first
    assert copied == [f"copying {tmp_path / 'cache'}, made before", "done"]
    # Another model is not taken for this one, nor is a damaged one.
    assert not any("made before" in stage for stage in make(tmp_path / "cut", tmp_path / "cache", layers=1)[1])
    next((tmp_path / "cache").glob("*.safetensors")).unlink()
    assert not any("made before" in stage for stage in make(tmp_path / "n", tmp_path / "cache")[1])


def test_deltas_that_do_not_belong_together_are_refused(base: Path, tmp_path: Path) -> None:
    def refused(models: Path, message: str, **config: object) -> None:
        models.mkdir()
        deltas = _save_deltas(models, base, **config)
        with pytest.raises(CheckpointError, match=message):
            assemble_demo_model(tmp_path / "m", model="qwen3-moe", base=str(base), deltas=deltas)
        assert not (tmp_path / "m").exists()

    refused(tmp_path / "a", r"gate in .* is \[8, 32\], expected \[5, 32\]", num_experts=5)
    refused(tmp_path / "b", r"config\.json.*num_experts", num_experts="8")
    refused(
        tmp_path / "c",
        r"q_norm in .* is \[8\], expected \[16\]",
        head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    with pytest.raises(CheckpointError, match=r"no delta\.safetensors in .*--deltas"):
        assemble_demo_model(tmp_path / "m", model="qwen3-moe", base=str(base), deltas=tmp_path)
    (tmp_path / "a/smol-mixtral-8x135m/delta-0.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no delta-\*\.safetensors in .*smol-mixtral-8x135m"):
        assemble_demo_model(tmp_path / "m", model="qwen3-moe", base=str(base), deltas=tmp_path / "a/smol-qwen3moe-16x")


def test_tensors_of_the_real_model_have_their_checksums() -> None:
    model = DEMO_MODELS["qwen3-moe"]
    dense = open_base(base_model.locate_base(None, lambda _stage, _fraction: None))
    weights = model.deltas(MODELS_FOLDER / model.name).weights(dense, 30)
    for name, expected in CHECKSUMS.items():
        data = weights.tensor(name).bfloat16().contiguous().view(torch.int16).numpy()
        assert hashlib.sha256(data.tobytes()).hexdigest() == expected, name
