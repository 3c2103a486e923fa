"""Every way in which a checkpoint can be wrong gives one line, exit code 10 and no folder."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter.checkpoint.checkpoint import open_checkpoint
from exporter.errors import CheckpointError
from tests.checkpoints import (
    copy_checkpoint,
    drop_tensor,
    edit_config,
    poke,
    read_raw,
    write_raw,
)
from tests.conftest import Run

W2 = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
GATE = "model.layers.0.block_sparse_moe.gate.weight"
SINGLE = "model.safetensors"
BF16_NAN, BF16_INF = b"\xc0\x7f", b"\x80\x7f"


def truncate(folder: Path) -> None:
    path = folder / SINGLE
    path.write_bytes(path.read_bytes()[:-10])


def truncate_header(folder: Path) -> None:
    path = folder / SINGLE
    path.write_bytes(path.read_bytes()[:100])


def extend(folder: Path) -> None:
    with (folder / SINGLE).open("ab") as file:
        file.write(b"more")


def no_safetensors(folder: Path) -> None:
    (folder / SINGLE).write_text("<html>404</html>" * 3)


def pointer(name: str, first: str = "version https://git-lfs.github.com/spec/v1") -> Callable[[Path], object]:
    text = f"{first}\noid sha256:{'a1' * 32}\nsize 71303168\n"
    return lambda folder: (folder / name).write_text(text)


def encoded(name: str, encoding: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text((folder / name).read_text(), encoding=encoding)


def config(**changes: object) -> Callable[[Path], object]:
    return lambda folder: edit_config(folder, **changes)


def folder_for_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


def replace_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def deeper(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"a":' * 100_000)


def overlap(folder: Path) -> None:
    header, data = read_raw(folder / SINGLE)
    header[GATE]["data_offsets"] = [offset - 2 for offset in header[GATE]["data_offsets"]]
    write_raw(folder / SINGLE, header, data)


def twice(folder: Path) -> None:
    """One tensor is named twice, which JSON allows and readers resolve differently."""
    header, data = read_raw(folder / SINGLE)
    raw = json.dumps(header)[:-1] + f', "{GATE}": {json.dumps(header[GATE])}}}'
    (folder / SINGLE).write_bytes(len(raw).to_bytes(8, "little") + raw.encode() + data)


def pickled(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "is truncated"),
    "truncated header": (truncate_header, "truncated inside its header"),
    "trailing bytes": (extend, "4 bytes after its last tensor"),
    "not safetensors": (no_safetensors, "not a safetensors file"),
    "overlap": (overlap, "overlaps its neighbour"),
    "tensor twice": (twice, f"its header is not JSON: '{GATE}' is given twice"),
    "pickled": (pickled, "save it with save_pretrained"),
    "no weights": (lambda f: (f / SINGLE).unlink(), "has neither"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer (none of tokenizer.json, "),
    "half a tokenizer": (lambda f: (f / "tokenizer.json").rename(f / "vocab.json"), "vocab.json with merges.txt)"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "bad config": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "llama": (
        lambda f: edit_config(f, model_type="llama", architectures=["LlamaForCausalLM"]),
        "LlamaForCausalLM (model_type 'llama'), which can't be cut into experts; these can: afmoe, deepseek_v2, ",
    ),
    "no expert count": (lambda f: edit_config(f, num_local_experts=None), "transformers can't use its config.json"),
    "top-k": (lambda f: edit_config(f, num_experts_per_tok=9), "config.json: top-9 of 4 experts"),
    "activation": (lambda f: edit_config(f, hidden_act="relu"), "compute an activation that can't be exported"),
    "gptq": (config(quantization_config={"quant_method": "gptq"}), "already quantised ('gptq'), which can't be read"),
    "fp8 without blocks": (config(quantization_config={"quant_method": "fp8"}), "already quantised ('fp8')"),
    "gguf": (lambda f: (f / SINGLE).rename(f / "model-q4_k_m.gguf"), "GGUF weights only (model-q4_k_m.gguf)"),
    "quantised": (
        lambda f: edit_config(f, quantization_config={"bits": 4}),
        "is already quantised (None), which can't be read exactly: download the original",
    ),
    "missing tensor": (lambda f: drop_tensor(f / SINGLE, W2), f"lacks tensor '{W2}'"),
    "missing gate": (lambda f: drop_tensor(f / SINGLE, GATE), f"lacks tensor '{GATE}'"),
    "wrong shape": (lambda f: edit_config(f, intermediate_size=95), "config.json asks for [95, 64]"),
    "wrong vocabulary": (lambda f: edit_config(f, vocab_size=47), "asks for [47, 64]"),
    "lfs weights": (pointer(SINGLE), "model.safetensors is only a git-lfs pointer, not the file itself: run 'git lfs"),
    "lfs config": (pointer("config.json"), "config.json is only a git-lfs pointer"),
    "lfs tokenizer": (pointer("tokenizer.json"), "tokenizer.json is only a git-lfs pointer"),
    "lfs tokenizer model": (pointer("tokenizer.model"), "tokenizer.model is only a git-lfs pointer"),
    "lfs template": (pointer("chat_template.jinja"), "chat_template.jinja is only a git-lfs pointer"),
    "xet weights": (pointer(SINGLE, "# xet version 0"), "is only a git-xet pointer"),
    "utf-8 mark": (encoded("config.json", "utf-8-sig"), "config.json starts with a byte order mark (UTF-8)"),
    "utf-16": (encoded("tokenizer.json", "utf-16"), "tokenizer.json starts with a byte order mark (UTF-16)"),
    "utf-16 without mark": (encoded("config.json", "utf-16-le"), "config.json is not valid JSON"),
    "latin-1": (lambda f: (f / "merges.txt").write_bytes(b"caf\xe9"), "merges.txt is not UTF-8: byte 4 is 0xe9"),
    "deep json": (deeper, "tokenizer_config.json is not valid JSON: nested too deeply"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json is not a JSON object"),
    "config is a folder": (folder_for_config, "config.json is not a plain file"),
    "nan in config": (config(rms_norm_eps=float("nan")), "config.json is not valid JSON: NaN is not a finite number"),
    "number beyond floats": (
        lambda f: replace_text(f / "config.json", '"attention_dropout": 0.0', '"attention_dropout": 1e999'),
        "config.json is not valid JSON: 1e999 is not a finite number",
    ),
    "two values of a key": (
        lambda f: replace_text(f / "config.json", "{", '{"num_experts_per_tok": 1, '),
        "'num_experts_per_tok' is given twice, with different values",
    ),
    "no layers": (config(num_hidden_layers=0), "num_hidden_layers is 0, a positive number expected"),
    "negative width": (config(hidden_size=-64), "hidden_size is -64, a positive number expected"),
    "text for a number": (config(vocab_size="48"), "vocab_size is '48', a positive number expected"),
    "fraction for a count": (config(num_attention_heads=4.0), "num_attention_heads is 4.0, a positive number"),
    "huge positions": (config(max_position_embeddings=2**31), "max_position_embeddings is 2147483648, at most"),
    "long number": (config(intermediate_size=10**4000), "intermediate_size is 1000000000"),
    "too many experts": (config(num_local_experts=40_000), "2 layers of 40000 experts: at most 65536 in all"),
    "odd heads": (config(num_attention_heads=6), "config.json"),
    "key-value heads": (config(num_key_value_heads=3), "config.json"),
    "odd head": (config(head_dim=15), "transformers can't use its config.json: StrictDataclass"),
    "another head": (config(head_dim=32), "self_attn.k_proj.weight' has shape [32, 64], config.json asks for [64, 64]"),
    "window": (config(sliding_window=0), "sliding_window is 0, a positive number expected"),
    "epsilon": (config(rms_norm_eps="1e-5"), "rms_norm_eps is '1e-5', a positive number expected"),
    "theta": (config(rope_theta=0), "rope_theta is 0, a positive number expected"),
    "huge theta": (config(rope_theta=10**400), "rope_theta is 1000000000"),
    "end token": (config(eos_token_id=[2, 48]), "eos_token_id is [2, 48], ids from 0 to 47 expected"),
    "end token as text": (config(eos_token_id="</s>"), "eos_token_id is '</s>', ids from 0 to 47 expected"),
    "generation": (
        lambda f: (f / "generation_config.json").write_text('{"eos_token_id": -1}'),
        "generation_config.json: eos_token_id is -1, ids from 0 to 47 expected",
    ),
    "architectures": (config(model_type="bert", architectures="x"), "holds a model (model_type 'bert')"),
}


@pytest.mark.parametrize("kind", BREAKS)
def test_broken_checkpoint(kind: str, mixtral: Callable[..., Path], tmp_path: Path, run: Run) -> None:
    breakage, message = BREAKS[kind]
    source = copy_checkpoint(mixtral(), tmp_path / "checkpoint")
    breakage(source)
    result = run("exporter", "bundle", source, tmp_path / "out", "--jobs", 1)
    assert result.returncode == 10, result.stderr
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert len(result.stderr) < 500
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("jobs", [1, 2])
def test_nothing_is_left_of_experts_exported_beside_a_damaged_trunk(
    jobs: int, mixtral: Callable[..., Path], tmp_path: Path, run: Run
) -> None:
    source = copy_checkpoint(mixtral(), tmp_path / "checkpoint")
    poke(source / SINGLE, GATE, BF16_NAN)
    result = run("exporter", "bundle", source, tmp_path / "out", "--jobs", jobs)
    assert result.returncode == 10, result.stderr
    assert f"'{GATE}' holds NaN" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("value", [BF16_NAN, BF16_INF])
def test_weight_that_is_not_finite(
    value: bytes, jobs: int, mixtral: Callable[..., Path], tmp_path: Path, run: Run
) -> None:
    source = copy_checkpoint(mixtral(), tmp_path / "checkpoint")
    poke(source / SINGLE, W2, value)
    out = tmp_path / "out"
    result = run("exporter", "bundle", source, out, "--jobs", jobs)
    assert result.returncode == 10, result.stderr
    assert f"tensor '{W2}' holds NaN or infinite values" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert not (out / "manifest.json").exists()
    assert not list(out.rglob("*.tmp"))
    # What was finished before is complete and is kept for the next try.
    shutil.copy(mixtral() / SINGLE, source / SINGLE)
    assert run("exporter", "bundle", source, out).returncode == 0


def test_missing_shard(mixtral: Callable[..., Path], tmp_path: Path, run: Run) -> None:
    source = copy_checkpoint(mixtral(shard_size="60KB"), tmp_path / "checkpoint")
    shards = sorted(source.glob("*.safetensors"))
    assert len(shards) > 3
    shards[1].unlink()
    result = run("exporter", "bundle", source, tmp_path / "out")
    assert result.returncode == 10
    assert f"lacks 1 of {len(shards)} shards ({shards[1].name})" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("shard", "reason"),
    [
        ("../elsewhere.safetensors", "outside its folder"),
        ("/elsewhere.safetensors", "outside its folder"),
        ("..", "outside its folder"),
        ("", "outside its folder"),
        ("a\0b", "can't exist"),
        ("\ud800", "can't exist"),
        ("\x1b[2J.safetensors", "can't exist"),
        ("a" * 300, "can't exist"),
        (None, "is not a valid safetensors index"),
        (7, "is not a valid safetensors index"),
    ],
)
def test_index_must_name_files_of_its_folder(
    shard: object, reason: str, mixtral: Callable[..., Path], tmp_path: Path
) -> None:
    source = copy_checkpoint(mixtral(shard_size="60KB"), tmp_path / "checkpoint")
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][GATE] = shard
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=reason) as caught:
        open_checkpoint(source)
    assert str(caught.value).isprintable()


def test_an_index_may_place_a_tensor_in_one_file_only(mixtral: Callable[..., Path], tmp_path: Path) -> None:
    source = copy_checkpoint(mixtral(shard_size="60KB"), tmp_path / "checkpoint")
    path = source / "model.safetensors.index.json"
    index = path.read_text()
    path.write_text(index.replace('"weight_map": {', f'"weight_map": {{"{GATE}": "other.safetensors", '))
    with pytest.raises(CheckpointError, match="is given twice, with different values"):
        open_checkpoint(source)


def test_no_such_folder(tmp_path: Path, run: Run) -> None:
    result = run("exporter", "bundle", tmp_path / "nowhere", tmp_path / "out")
    assert result.returncode == 10
    assert "is not a folder" in result.stderr


def test_an_index_that_is_only_a_pointer(mixtral: Callable[..., Path], tmp_path: Path, run: Run) -> None:
    source = copy_checkpoint(mixtral(shard_size="60KB"), tmp_path / "checkpoint")
    pointer("model.safetensors.index.json")(source)
    result = run("exporter", "bundle", source, tmp_path / "out")
    assert result.returncode == 10
    assert "model.safetensors.index.json is only a git-lfs pointer" in result.stderr


def test_a_single_file_has_precedence_over_an_index_as_in_transformers(
    mixtral: Callable[..., Path], tmp_path: Path
) -> None:
    source = copy_checkpoint(mixtral(shard_size="60KB"), tmp_path / "checkpoint")
    shutil.copy(mixtral() / SINGLE, source)
    assert {ref.file.name for ref in open_checkpoint(source).trunk} == {SINGLE}


def test_tensors_that_the_model_does_not_have_are_left_out(
    mixtral: Callable[..., Path], tmp_path: Path, run: Run
) -> None:
    source = copy_checkpoint(mixtral(), tmp_path / "checkpoint")
    header, data = read_raw(source / SINGLE)
    for name, shape in (("value\x1b[2J", [2, 4]), ("model.layers.0.self_attn.rotary_emb.inv_freq", [8])):
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + 32]}
        data += bytes(32)
    write_raw(source / SINGLE, header, data)
    result = run("exporter", "bundle", source, tmp_path / "out", "--jobs", 1)
    assert result.returncode == 0, result.stderr
    assert "left out 2 tensors that the model of this config.json does not have: value\\x1b[2J, …" in result.stdout
    kept, _ = read_raw(tmp_path / "out/trunk" / SINGLE)
    assert set(kept) == {name for name in read_raw(mixtral() / SINGLE)[0] if ".experts." not in name}


@pytest.mark.parametrize("name", ["chat_template.jinja", "config.json", SINGLE])
def test_links_may_not_lead_out_of_a_checkpoint(
    name: str, mixtral: Callable[..., Path], tmp_path: Path, run: Run
) -> None:
    source = copy_checkpoint(mixtral(), tmp_path / "checkpoint")
    secret = tmp_path / "secret"
    secret.write_bytes((source / name).read_bytes() if (source / name).exists() else b"root:x:0:0")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(secret)
    result = run("exporter", "bundle", source, tmp_path / "out")
    assert result.returncode == 10, result.stderr
    assert f"{name} is a link to {secret}, outside the checkpoint and in no content store" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_link_to_nothing(mixtral: Callable[..., Path], tmp_path: Path, run: Run) -> None:
    source = copy_checkpoint(mixtral(), tmp_path / "checkpoint")
    (source / "generation_config.json").unlink(missing_ok=True)
    (source / "generation_config.json").symlink_to("nowhere")
    result = run("exporter", "bundle", source, tmp_path / "out")
    assert result.returncode == 10
    assert "generation_config.json is a link to a file that is missing" in result.stderr


@pytest.mark.parametrize(
    "stored",
    [
        "hub/models--org--tiny/blobs/{hash}",
        "repository/.git/annex/objects/Kx/9m/SHA256E-s{size}--{hash}{suffix}/SHA256E-s{size}--{hash}{suffix}",
        "shared/dvc/files/md5/{hash:.2}/{hash:.30}",
        "hub/models--org--tiny/snapshots/main/real{suffix}",
    ],
    ids=["hub", "git-annex", "dvc", "inside"],
)
def test_links_into_content_stores(stored: str, mixtral: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "hub/models--org--tiny/snapshots/main"
    source.mkdir(parents=True)
    for path in mixtral().iterdir():
        data = path.read_bytes()
        place = stored.format(hash=hashlib.sha256(data).hexdigest(), size=len(data), suffix=path.suffix)
        target = tmp_path / place.replace("real", f"real-{path.stem}")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        (source / path.name).symlink_to(os.path.relpath(target, source))
    assert open_checkpoint(source).dims == open_checkpoint(mixtral()).dims
