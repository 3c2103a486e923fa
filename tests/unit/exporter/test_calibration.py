"""Calibrated experts err less on text like the calibration's, at the same bytes; exports with a text resume."""

import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from exporter.bundle.bundle import export_bundle
from exporter.calibration.capture import capture, expert_output
from exporter.calibration.text import read_text
from exporter.checkpoint.checkpoint import open_checkpoint
from exporter.expert.layer_inputs import FEW_ROWS, LayerInputs, expert_rows, load_layer
from exporter.expert.probe import relative_error, run_rows
from tests.checkpoints import EXPERTS, LAYERS, VOCABULARY, tiny_moe
from tests.conftest import Run
from wire.errors import BundleError
from wire.experts import ExpertId
from wire.manifest import Quantisation

INT4 = Quantisation(scheme="int4", block=32)


def draw_words(count: int, seed: int) -> list[int]:
    """Token ids of a text in which few words are common, as in a language."""
    draw = random.Random(seed)  # noqa: S311 - a text, not a secret
    return [1 + min(int(draw.expovariate(0.2)), VOCABULARY - 2) for _ in range(count)]


def write_words(path: Path, count: int) -> Path:
    """A file of such a text; the tokenizer of the tests knows single words only."""
    path.write_text("".join(f'{{"text": "w{id}"}}\n' for id in draw_words(count, seed=1)))
    return path


def test_held_out_error_is_less_at_the_same_bytes(mixtral: Callable[..., Path], tmp_path: Path) -> None:
    text = read_text(write_words(tmp_path / "text.jsonl", 3000))
    plain = export_bundle(mixtral(), tmp_path / "plain", INT4, jobs=1).manifest
    made = export_bundle(mixtral(), tmp_path / "calibrated", INT4, jobs=1, calibrate=text).manifest
    assert [[f.bytes for f in e.files] for e in made.experts] == [[f.bytes for f in e.files] for e in plain.experts]
    assert str(made.quantisation) == "int4 b32 calibrated"
    assert b'"calibration"' not in (tmp_path / "plain/manifest.json").read_bytes()
    assert made.quantisation.calibration == msgspec.convert(
        {"method": "gptq", "text_sha256": text.sha256, "tokens": 3000 // 64 * 64}, type(made.quantisation.calibration)
    )
    assert sorted(p.name for p in (tmp_path / "calibrated").iterdir()) == ["experts", "manifest.json", "trunk"]
    source = open_checkpoint(mixtral())
    windows = [draw_words(64, seed) for seed in range(2, 6)]
    capture(source, tmp_path / "plain/trunk", windows, tmp_path / "held-out", lambda *_: None)
    ratios = []
    for layer in range(LAYERS):
        inputs = load_layer(tmp_path / "held-out", layer)
        for expert in range(EXPERTS):
            x = inputs.hidden[(inputs.chosen == expert).any(axis=1)][:16]
            wanted = expert_output(
                source.experts[ExpertId(layer, expert)], source.architecture.expert, torch.from_numpy(x)
            ).numpy()
            plain_error, error = (
                relative_error(run_rows(tmp_path / name / f"experts/L{layer:02d}/E{expert}.onnx", x), wanted)
                for name in ("plain", "calibrated")
            )
            ratios.append(error / plain_error)
    assert max(ratios) < 1
    assert np.mean(ratios) < 0.8


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_captured_inputs_are_those_of_the_model(family: str, tmp_path: Path) -> None:
    model = tiny_moe(tmp_path / "model", family)
    export_bundle(tmp_path / "model", tmp_path / "bundle", INT4, experts=[0], jobs=1)
    source = open_checkpoint(tmp_path / "model")
    windows = [[(7 * i + 11 * w) % VOCABULARY for i in range(16)] for w in range(2)]
    capture(source, tmp_path / "bundle/trunk", windows, tmp_path / "captured", lambda *_: None)
    seen = []
    for module in model.modules():
        if hasattr(module, "_apply_gate"):
            module.register_forward_pre_hook(lambda _, x: seen.append(x[0].reshape(-1, x[0].shape[-1]).clone()))
    with torch.inference_mode():
        model(input_ids=torch.tensor(windows))
    assert len(seen) == source.dims.layers
    for layer, wanted in enumerate(seen):
        assert relative_error(load_layer(tmp_path / "captured", layer).hidden, wanted.numpy()) < 0.01  # bfloat16


def test_experts_with_few_tokens_get_others_of_their_layer() -> None:
    hidden = np.arange(1000, dtype=np.float32)[:, None]
    chosen = np.zeros((1000, 1), np.int32)
    chosen[:5] = 1
    inputs = LayerInputs(hidden, chosen, np.full((1000, 1), 0.5, np.float32))
    rows, weights = expert_rows(inputs, 0)
    assert len(rows) == 995
    assert (weights == 0.5).all()
    rows, weights = expert_rows(inputs, 1)
    assert rows[:5].ravel().tolist() == [0, 1, 2, 3, 4]
    assert len(np.unique(rows)) == FEW_ROWS
    np.testing.assert_allclose(weights, [0.5] * 5 + [0.05] * (FEW_ROWS - 5))
    rows, weights = expert_rows(inputs, 2)
    assert len(rows) == FEW_ROWS
    assert (weights == 1).all()


def test_an_interrupted_export_uses_the_captured_inputs_again(mixtral: Callable[..., Path], tmp_path: Path) -> None:
    text, out = read_text(write_words(tmp_path / "text.jsonl", 400)), tmp_path / "out"
    layers = []

    def interrupt(done: int, _: int) -> None:
        if done:
            raise KeyboardInterrupt

    def note(done: int, _: int) -> None:
        layers.append(done)

    with pytest.raises(KeyboardInterrupt):
        export_bundle(mixtral(), out, INT4, jobs=1, calibrate=text, progress=interrupt, calibration_progress=note)
    assert layers == [1, 2]
    with pytest.raises(BundleError, match="another unfinished export"):
        export_bundle(mixtral(), out, INT4, jobs=1)
    result = export_bundle(mixtral(), out, INT4, jobs=1, calibrate=text, calibration_progress=note)
    assert (result.kept, layers) == (1, [1, 2])
    assert export_bundle(mixtral(), out, INT4, jobs=1, calibrate=text).up_to_date
    with pytest.raises(BundleError, match=r"already holds another bundle \(.*int4 b32 calibrated"):
        export_bundle(mixtral(), out, INT4, jobs=1)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("text.txt", b"\xff\xfe\x00", "is not UTF-8 text"),
        ("text.txt", b" \n", "holds no text"),
        ("text.txt", b"w1", "has 1 tokens, too few"),
        ("text.jsonl", b'{"text": "w1"}\n{"title": "w2"}\n', "line 2: neither 'text' nor"),
    ],
)
def test_invalid_texts_are_one_error_line(
    name: str, content: bytes, said: str, mixtral: Callable[..., Path], tmp_path: Path, run: Run
) -> None:
    (tmp_path / name).write_bytes(content)
    result = run("exporter", "bundle", mixtral(), tmp_path / "out", "--calibrate", tmp_path / name)
    assert result.returncode == 1
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_calibration_is_for_blocks(mixtral: Callable[..., Path], tmp_path: Path, run: Run) -> None:
    text = write_words(tmp_path / "text.jsonl", 100)
    result = run("exporter", "bundle", mixtral(), tmp_path / "out", "--quant", "fp16", "--calibrate", text)
    assert result.returncode == 2
    assert "--calibrate is for --quant int4 and int8, not fp16" in result.stderr
