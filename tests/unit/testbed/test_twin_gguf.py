"""Twins for llama.cpp, read back with the reader of gguf."""

import math
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize

from testbed.twin import shapes
from testbed.twin.gguf_file import gguf_tensors, write_twin_gguf
from testbed.twin.shapes import CONFIGS, TwinName, checkpoint_tensors
from tests.conftest import Run
from tests.unit.testbed.test_twin import SMALL

MIXTRAL_BYTES = 26_440_000_000
"""Of a Mixtral-8x7B in q4_0: 26.44 GB on the hub."""


def _columns(config: dict[str, Any]) -> dict[str, Any]:
    """A head of 256 values per row, of which q6_K needs a multiple."""
    return {**config, "hidden_size": 256, "num_attention_heads": 4, "head_dim": 64}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_is_read_back_with_the_twins_shapes_and_finite_weights(
    name: TwinName, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _columns({**CONFIGS[name], **SMALL[name]})
    monkeypatch.setitem(shapes.CONFIGS, name, config)
    monkeypatch.setattr("testbed.twin.gguf_file._PIECE", 20_000)
    out = tmp_path / "twin.gguf"
    made = run("testbed", "twin", name, out, "--format", "gguf", "--layers", 2, "--jobs", 1)
    assert made.returncode == 0, made.stderr
    assert made.stderr == ""
    assert re.fullmatch(rf"{name}: .+ of weights in {re.escape(str(out))}\n", made.stdout)
    reader = gguf.GGUFReader(out)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    architecture = "llama" if name == "mixtral-8x7b" else "qwen3moe"
    assert fields["general.architecture"] == architecture
    assert fields[f"{architecture}.block_count"] == 2
    assert fields[f"{architecture}.expert_used_count"] == config["num_experts_per_tok"]
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(set(tokens)) == len(tokens) == config["vocab_size"]
    assert tokens[fields["tokenizer.ggml.eos_token_id"]] == "<|end|>"

    experts = fields[f"{architecture}.expert_count"]
    two = {**config, "num_hidden_layers": 2}
    assert sum(math.prod(map(int, tensor.shape)) for tensor in reader.tensors) == sum(
        math.prod(tensor.shape) for tensor in checkpoint_tensors(two)
    )
    shapes_by_name = {tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in reader.tensors}
    inner = config.get("moe_intermediate_size", config["intermediate_size"])
    assert shapes_by_name["blk.1.ffn_gate_exps.weight"] == (experts, inner, 256)
    assert shapes_by_name["blk.1.ffn_down_exps.weight"] == (experts, 256, inner)
    assert shapes_by_name["blk.0.attn_k.weight"] == (2 * 64, 256)
    drawn = set()
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 1:
            assert (values == 1).all()
            continue
        drawn.add(tensor.data.tobytes())
        assert np.isfinite(values).all()
        assert 0.8 < values.std() * values.shape[-1] ** 0.5 < 1.2, tensor.name
    assert len(drawn) == sum(len(shape) > 1 for shape in shapes_by_name.values()), "all tensors differ"


def test_the_whole_shape_has_the_types_and_the_size_of_the_real_file() -> None:
    tensors = {tensor.name: tensor for tensor in gguf_tensors(CONFIGS["mixtral-8x7b"])}
    assert sum(tensor.bytes for tensor in tensors.values()) == pytest.approx(MIXTRAL_BYTES, rel=0.01)
    kinds = {name.removeprefix("blk.7."): tensor.kind for name, tensor in tensors.items() if "blk.7." in name}
    assert {name for name, kind in kinds.items() if kind == Kind.F32} == {
        "attn_norm.weight", "ffn_norm.weight", "ffn_gate_inp.weight",
    }  # fmt: skip
    assert {name for name, kind in kinds.items() if kind == Kind.Q8_0} == {"attn_k.weight", "attn_v.weight"}
    assert tensors["output.weight"].kind == Kind.Q6_K
    assert tensors["token_embd.weight"].kind == kinds["ffn_down_exps.weight"] == Kind.Q4_0


def test_several_processes_write_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name: TwinName = "mixtral-8x7b"
    monkeypatch.setitem(shapes.CONFIGS, name, {**CONFIGS[name], **SMALL[name]})
    seen: list[tuple[int, int]] = []
    for jobs in (1, 2):
        path = tmp_path / str(jobs)
        size = write_twin_gguf(path, name, layers=1, seed=3, jobs=jobs, progress=lambda *at: seen.append(at))
        assert seen[-1] == (size, size)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}, "no temporary file is left"


def test_what_cannot_be_written_is_refused(tmp_path: Path, run: Run) -> None:
    there = tmp_path / "there.gguf"
    there.write_bytes(b"GGUF")
    again = run("testbed", "twin", "mixtral-8x7b", there, "--format", "gguf", "--layers", 1)
    assert (again.returncode, "exists: name a new file" in again.stderr) == (12, True)
    assert there.read_bytes() == b"GGUF"
    cut = run("testbed", "twin", "mixtral-8x7b", tmp_path / "new", "--slices", 2)
    assert (cut.returncode, "--slices is for --format bundle" in cut.stderr) == (2, True)
