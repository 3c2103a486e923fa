"""Every way in which a checkpoint can be wrong gives one line, exit code 10 and no folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

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
    (folder / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\n" * 3)


def overlap(folder: Path) -> None:
    header, data = read_raw(folder / SINGLE)
    header[GATE]["data_offsets"] = [offset - 2 for offset in header[GATE]["data_offsets"]]
    write_raw(folder / SINGLE, header, data)


def pickled(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def fused(folder: Path) -> None:
    header, data = read_raw(folder / SINGLE)
    header["model.layers.0.mlp.experts.gate_up_proj"] = header.pop(W2)
    write_raw(folder / SINGLE, header, data)


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "is truncated"),
    "truncated header": (truncate_header, "truncated inside its header"),
    "trailing bytes": (extend, "4 bytes after its last tensor"),
    "not safetensors": (no_safetensors, "not a safetensors file"),
    "overlap": (overlap, "overlaps its neighbour"),
    "pickled": (pickled, "save it with save_pretrained"),
    "fused": (fused, "fused experts"),
    "no weights": (lambda f: (f / SINGLE).unlink(), "has neither"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer (none of tokenizer.json, "),
    "half a tokenizer": (lambda f: (f / "tokenizer.json").rename(f / "vocab.json"), "vocab.json with merges.txt)"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "bad config": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "llama": (
        lambda f: edit_config(f, model_type="llama", architectures=["LlamaForCausalLM"]),
        "LlamaForCausalLM (model_type 'llama'), not a Mixtral",
    ),
    "no expert count": (lambda f: edit_config(f, num_local_experts=None), "num_local_experts is None"),
    "top-k": (lambda f: edit_config(f, num_experts_per_tok=9), "exceeds num_local_experts 4"),
    "activation": (lambda f: edit_config(f, hidden_act="gelu"), "only 'silu' is supported"),
    "quantised": (lambda f: edit_config(f, quantization_config={"bits": 4}), "already quantised"),
    "missing tensor": (lambda f: drop_tensor(f / SINGLE, W2), f"lacks tensor '{W2}'"),
    "missing gate": (lambda f: drop_tensor(f / SINGLE, GATE), f"lacks tensor '{GATE}'"),
    "wrong shape": (lambda f: edit_config(f, intermediate_size=95), "config.json asks for [95, 64]"),
    "wrong vocabulary": (lambda f: edit_config(f, vocab_size=47), "asks for [47, 64]"),
    "nan in trunk": (lambda f: poke(f / SINGLE, GATE, BF16_NAN), f"'{GATE}' holds NaN"),
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


def test_index_must_stay_in_its_folder(mixtral: Callable[..., Path], tmp_path: Path, run: Run) -> None:
    source = copy_checkpoint(mixtral(shard_size="60KB"), tmp_path / "checkpoint")
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][GATE] = "../elsewhere.safetensors"
    path.write_text(json.dumps(index))
    result = run("exporter", "bundle", source, tmp_path / "out")
    assert result.returncode == 10
    assert "outside its folder" in result.stderr


def test_no_such_folder(tmp_path: Path, run: Run) -> None:
    result = run("exporter", "bundle", tmp_path / "nowhere", tmp_path / "out")
    assert result.returncode == 10
    assert "is not a folder" in result.stderr
