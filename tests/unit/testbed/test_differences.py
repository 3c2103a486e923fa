"""The table of expert differences, against the checkpoint's own weights and transformers' own hidden states."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import torch
from transformers import AutoTokenizer, MixtralForCausalLM

from bs_coordinator.selection.differences import DifferenceDocument, read_differences
from testbed.evaluation.differences import find_super_experts
from tests.in_process import run_in_process
from wire.manifest import Scheme

TEXT = (
    "Rain falls when clouds are full. " * 40
    + "def add(a, b):\n    return a + b\n" * 20
    + "Berlin, Paris, 1 2 3 4. " * 30
)


def _independent(model_path: Path, tokens: int) -> tuple[np.ndarray, list[float]]:
    """Differences and peaks of layer 0, with one context for all tokens."""
    model = MixtralForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    ids = AutoTokenizer.from_pretrained(model_path).encode(TEXT)[:tokens]
    with torch.inference_mode():
        model(torch.tensor([ids]))
    x = seen[0].reshape(-1, model.config.hidden_size)
    # transformers' fused layout: w1 above w3, then w2.
    mlp = dict(model.model.layers[0].mlp.named_parameters())
    gate_up, down = mlp["experts.gate_up_proj"].detach(), mlp["experts.down_proj"].detach()
    chosen = (x @ mlp["gate.weight"].detach().T).topk(2, dim=1).indices
    outputs = []
    for e in range(8):
        gate, up = (x @ gate_up[e].T).chunk(2, dim=1)
        outputs.append((torch.nn.functional.silu(gate) * up) @ down[e].T)
    table = np.zeros((8, 8))
    peaks = [float(outputs[a][(chosen == a).any(dim=1)].abs().max()) for a in range(8)]
    for a in range(8):
        rows = (chosen == a).any(dim=1)
        for b in range(8):
            distance = (outputs[b] - outputs[a])[rows].norm(dim=1) / outputs[a][rows].norm(dim=1)
            table[a, b] = distance.mean()
    return table, peaks


def test_the_table_is_what_the_checkpoint_says(
    tiny_model: Path, tiny_bundle: Callable[[Scheme], Path], tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "table.json"
    argv = ["differences", tiny_bundle("fp32"), tmp_path / "text.txt", "--tokens", 400, "--chunk", 400, "--out", out]
    done = run_in_process("testbed", *argv)
    assert done.returncode == 0, done.stderr
    differences, peaks = _independent(tiny_model, 400)
    np.testing.assert_allclose(read_differences(out).values[0], differences, atol=2e-4)
    document = msgspec.json.decode(out.read_bytes(), type=DifferenceDocument)
    np.testing.assert_allclose(document.peaks[0], peaks, rtol=1e-2)
    assert document.super_experts == []
    assert "experts that must never be dropped: none" in done.stdout


def test_only_extreme_experts_are_never_dropped() -> None:
    peaks = np.random.default_rng(0).uniform(1, 4, (24, 16))
    assert find_super_experts(peaks) == [], "the largest of ordinary experts is ordinary"
    peaks[1, 5] = 900.0
    assert find_super_experts(peaks) == [(1, 5)]
    peaks[2, 3] = 300.0
    assert find_super_experts(peaks) == [(1, 5), (2, 3)]
    peaks[2, 4] = 50.0
    assert find_super_experts(peaks) == [(1, 5), (2, 3)], "less than a tenth of the largest"
    assert find_super_experts(np.zeros((2, 8))) == []


def test_too_little_text_is_reported(tiny_bundle: Callable[[Scheme], Path], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Rain.")
    done = run_in_process(
        "testbed", "differences", tiny_bundle("fp32"), tmp_path / "text.txt", "--out", tmp_path / "table.json"
    )
    assert done.returncode != 0
    assert "tokens, but --tokens needs 2048" in done.stderr
    assert not (tmp_path / "table.json").exists()
