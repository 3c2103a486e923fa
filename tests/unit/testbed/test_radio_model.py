"""Traces of, and accuracy under, a real model: the demo model's first two layers."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from bs_coordinator.engine.tokenizer import Tokenizer
from bs_coordinator.selection import parse_policy
from bs_coordinator.trunk.meta_model import expert_modules
from testbed.cli import cli
from testbed.evaluation.quality import DOMAINS, TASKS
from testbed.radio.accuracy import evaluate
from testbed.radio.setting import Cell, Setting
from testbed.radio.traces import read_trace
from tests.checkpoints import tiny_moe
from tests.conftest import Run
from wire.manifest import Scheme

QUESTIONS = ("What do bees make?", "Which is colder: ice or steam?", "Where do fish live?", "How many legs has a cat?")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of evaluation data, tiny."""
    folder = tmp_path / "data"
    folder.mkdir()
    items = [{"question": q, "choices": ["Honey.", "Water and ice."], "label": i % 2} for i, q in enumerate(QUESTIONS)]
    for file in TASKS.values():
        (folder / file).write_text("\n".join(json.dumps(item) for item in items))
    (folder / DOMAINS).write_text(json.dumps({"domain": "manual", "text": "The command lists files. " * 20}))
    return folder


def _trace(data: Path, bundle: Path, out: Path, *options: str) -> None:
    arguments = ["trace-routing", "--data", str(data), "--bundle", str(bundle), "--out", str(out), *options]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output


def test_trace_is_what_transformers_gates_say(
    tiny_model: Path, tiny_bundle: Callable[[Scheme], Path], data: Path, tmp_path: Path
) -> None:
    bundle = tiny_bundle("fp32")
    _trace(data, bundle, tmp_path / "trace.npz", "--items", "2", "--texts", "1", "--tokens", "16")
    trace = read_trace(tmp_path / "trace.npz")
    assert len(trace.prompts) == 5
    assert (trace.layers, trace.experts, trace.facts.top_k) == (2, 8, 2)
    assert set(trace.facts.data_sha256) == {*TASKS.values(), DOMAINS}
    reference = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    ids = Tokenizer(bundle / "trunk").encode(f"Question: {QUESTIONS[1]}\nAnswer:")[:16]
    with torch.inference_mode():
        logits = reference(torch.tensor([ids]), output_router_logits=True).router_logits
    for layer in range(2):
        expected = torch.softmax(logits[layer].float(), dim=-1).numpy()
        assert np.abs(trace.prompts[1].scores[:, layer] - expected).max() < 1e-4


def test_a_model_that_chooses_by_a_bias_is_traced_and_replayed(data: Path, tmp_path: Path, run: Run) -> None:
    """Sigmoid scores, a bias for each expert and groups of experts; a text that goes through the layers in pieces."""
    model = tiny_moe(tmp_path / "checkpoint", "deepseek_v3")
    tokenizer = tmp_path / "checkpoint" / "tokenizer.json"
    by_words = {"pre_tokenizer": {"type": "WhitespaceSplit"}}
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_bytes()) | by_words))
    bundle = tmp_path / "bundle"
    exported = run("exporter", "bundle", tmp_path / "checkpoint", bundle, "--quant", "fp32", "--jobs", "1")
    assert exported.returncode == 0, exported.stderr
    words = " ".join(f"w{3 + i * i % 40}" for i in range(200))
    (data / DOMAINS).write_text(json.dumps({"domain": "manual", "text": words}))
    _trace(data, bundle, tmp_path / "trace.npz", "--items", "0", "--texts", "1", "--tokens", "200")
    trace = read_trace(tmp_path / "trace.npz")
    assert (trace.tokens, trace.layers, trace.experts) == (200, 2, 8)
    chosen: list[np.ndarray] = []
    for experts in expert_modules(model):
        experts.register_forward_pre_hook(lambda _, arguments: chosen.append(np.sort(arguments[1].numpy(), axis=1)))
    with torch.inference_mode():
        model(torch.tensor([Tokenizer(bundle / "trunk").encode(words)]))
    (prompt,) = trace.prompts
    assert prompt.order is not None
    by_scores = 0
    for layer, expected in enumerate(chosen):
        routing = prompt.layer(layer, 2)
        found = np.sort(np.argsort(-routing.weights, axis=1)[:, :2], axis=1)
        # Two experts of nearly the same rank may change places with the order of additions.
        assert (found == expected).all(axis=1).mean() > 0.98
        by_scores += int((np.sort(np.argsort(-prompt.scores[:, layer], axis=1)[:, :2], axis=1) == expected).sum())
    assert by_scores < 0.95 * sum(expected.size for expected in chosen)
    arguments = ["simulate", str(tmp_path / "trace.npz"), "--draws", "4", "--policy", "subset"]
    result = CliRunner().invoke(cli, [*arguments, "--out", str(tmp_path / "out")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "| subset | optimal |" in result.output


def test_accuracy_depends_on_links_only_where_the_policy_looks_at_them(
    tiny_bundle: Callable[[Scheme], Path], data: Path
) -> None:
    policies = [parse_policy(text, top_k=2) for text in ("topk", "top1", "wdmoe:start=1,stop=1")]
    cell = Cell(Setting(), hidden=576, intermediate=1536, draws=4, seed=0)
    topk, top1, drops_all = evaluate(tiny_bundle("fp32"), data, cell, policies, items=4, batch=2, threads=1)
    assert topk.asked == 2
    assert top1.asked == drops_all.asked == 1
    for task in TASKS:
        assert topk.right[task].shape == (4,)
        assert topk.right[task].dtype == np.bool_
        # A threshold of 1 takes every token's second expert, whatever the links.
        assert top1.right[task].tolist() == drops_all.right[task].tolist()


def test_simulate_with_accuracy_and_sweep(tiny_bundle: Callable[[Scheme], Path], data: Path, tmp_path: Path) -> None:
    bundle = tiny_bundle("fp32")
    _trace(data, bundle, tmp_path / "trace.npz", "--items", "4", "--texts", "0")
    arguments = ["simulate", str(tmp_path / "trace.npz"), "--draws", "10", "--out", str(tmp_path / "out")]
    arguments += ["--sensitivity", "--sweep-draws", "2"]
    arguments += ["--evaluate", str(data), "--bundle", str(bundle), "--items", "4"]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "out" / "simulation.json").read_bytes())
    assert [(row["policy"], row["task"]) for row in document["accuracy"]] == [
        (policy, task) for policy in ("topk", "wdmoe") for task in TASKS
    ]
    assert "| wdmoe | PIQA |" in (tmp_path / "out" / "simulation.md").read_text()
    assert (tmp_path / "out" / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    rows = (tmp_path / "out" / "sensitivity.csv").read_text().splitlines()
    assert rows[0].startswith("theta,gain,allocation")
    assert rows[-1].startswith("1.0,fixed,optimal")
