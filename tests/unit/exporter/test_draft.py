"""Draft models: a dense Llama as one quantised graph, in a bundle or on its own."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bs_coordinator.engine.speculation import load_draft_model
from bs_coordinator.engine.speculation.draft_graph import DraftGraph
from bs_coordinator.engine.speculation.drafts import Drafter
from bs_coordinator.engine.speculation.model_drafter import MOST_READ, Choice
from bs_coordinator.engine.tokenizer import Tokenizer
from exporter.draft.draft import export_draft
from exporter.draft.draft_graph import QUANTISATION
from exporter.draft.expert_mean import ExpertMean
from exporter.errors import CheckpointError
from exporter.expert.encoders import make_encoder
from tests.checkpoints import INTERMEDIATE, VOCABULARY, save_mixtral
from tests.drafts import greedy
from wire.errors import BundleError
from wire.manifest import Quantisation, Scheme, load_manifest

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def base(tiny_bundle: Callable[[Scheme], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with the demo model's tokens."""
    folder = tmp_path_factory.mktemp("base")
    return _save_llama(folder, tiny_bundle("int4") / "trunk", vocab=49152)


def _save_llama(folder: Path, tokenizer: Path, *, vocab: int) -> Path:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder)
    return folder


@pytest.fixture(scope="module")
def bundle(base: Path, tiny_bundle: Callable[[Scheme], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two-layer model's bundle with a draft model."""
    folder = tmp_path_factory.mktemp("with-draft") / "bundle"
    shutil.copytree(tiny_bundle("int4"), folder)
    export_draft(folder, base=str(base))
    return folder


def _dequantised(base: Path) -> Any:
    """The base as transformers runs it, with its weights rounded as the graph stores them."""
    model: Any = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        rows, columns = module.weight.shape
        encoder = make_encoder(QUANTISATION, rows, columns)
        step = 64
        packed = [encoder.encode(module.weight[i : i + step].detach().numpy()).copy() for i in range(0, rows, step)]
        scales, zeros = encoder.finish()
        codes = np.concatenate(packed).reshape(rows, -1, QUANTISATION.block).astype(np.float32)
        zero = zeros.reshape(rows, -1, 1).astype(np.float32)
        weight = (codes - zero) * scales.reshape(rows, -1, 1)
        # The head shares its weights with the embedding, which is not quantised.
        module.weight = torch.nn.Parameter(torch.from_numpy(weight.reshape(rows, columns)))
        assert name
    return model


def test_the_graph_is_the_model(base: Path, bundle: Path) -> None:
    """transformers with the same weights is the reference. Activations are int8 per block in the graph, which leaves
    about a hundredth of each logit's spread: guesses may differ where two tokens are that close."""
    manifest = load_manifest(bundle)
    model = load_draft_model(bundle, manifest, Tokenizer(bundle / "trunk").ids, folder=None, device="cpu")
    assert model is not None
    reference = _dequantised(base)
    same = 0
    for seed in range(8):
        ids = torch.randint(0, 49152, (30,), generator=torch.Generator().manual_seed(seed)).tolist()
        guesses = greedy(model.drafter(), ids, 4)
        with torch.inference_mode():
            for i, guess in enumerate(guesses):
                before = ids + [g.id for g in guesses[:i]]
                logits = reference(torch.tensor([before])).logits[0, -1]
                probabilities = torch.softmax(logits, dim=-1)
                best = int(probabilities.argmax())
                same += guess.id == best
                # `prior` is the model's own probability of its guess.
                assert guess.prior == pytest.approx(float(probabilities[guess.id]), rel=0.25, abs=0.01)
    assert same >= 28


def test_what_was_refused_is_forgotten(bundle: Path) -> None:
    ids = list(range(100, 140))
    model = load_draft_model(
        bundle, load_manifest(bundle), Tokenizer(bundle / "trunk").ids, folder=None, device="cpu"
    )  # fmt: skip
    assert model is not None
    drafter = model.drafter()
    first = [g.id for g in greedy(drafter, ids, 6)]
    other = [*ids, first[0], 7, 8]
    went_on = [g.id for g in greedy(drafter, other, 4)]
    assert went_on == [g.id for g in greedy(model.drafter(), other, 4)]
    assert [g.id for g in greedy(drafter, ids, 6)] == first


def _ids(drafter: Drafter, ids: list[int]) -> list[int]:
    return [guess.id for guess in greedy(drafter, ids, 4)]


def test_a_prompt_is_read_beforehand_and_not_again(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = load_manifest(bundle)
    model = load_draft_model(bundle, manifest, Tokenizer(bundle / "trunk").ids, folder=None, device="cpu")
    assert model is not None
    ids = np.random.default_rng(4).integers(40000, size=60).tolist()
    expected = _ids(model.drafter(), [*ids, 5])
    drafter = model.drafter()
    read: list[tuple[int, str]] = []
    reader = drafter._reader  # type: ignore[attr-defined]
    before = reader.read

    def noted(some: list[int], past: int) -> list[Choice]:
        read.append((len(some), threading.current_thread().name))
        return before(some, past)  # type: ignore[no-any-return]

    monkeypatch.setattr(reader, "read", noted)
    drafter.prepare(ids)
    assert _ids(drafter, [*ids, 5]) == expected
    assert [length for length, _ in read] == [60, 1, 1, 1, 1]
    assert read[0][1].startswith("draft")
    assert read[1][1] == threading.current_thread().name
    # Another prompt meanwhile is another beginning.
    drafter.prepare(ids[:30])
    drafter.prepare(ids)
    assert _ids(drafter, [*ids, 5]) == expected


def test_of_a_long_prompt_the_end_is_read(bundle: Path) -> None:
    model = load_draft_model(
        bundle, load_manifest(bundle), Tokenizer(bundle / "trunk").ids, folder=None, device="cpu"
    )  # fmt: skip
    assert model is not None
    ids = list(range(1000, 3000))
    long, short = model.drafter(), model.drafter()
    assert greedy(long, ids, 1) == greedy(short, ids[-MOST_READ:], 1)
    # More tokens than the model has positions.
    for start in range(2000, 2600, 100):
        ids += range(start, start + 100)
        greedy(long, ids, 1)


def test_only_a_model_with_the_same_tokens_drafts(base: Path, bundle: Path, tmp_path: Path) -> None:
    other = _save_llama(tmp_path / "other", base, vocab=1000)
    with pytest.raises(CheckpointError, match="1000 tokens in its vocabulary"):
        export_draft(bundle, base=str(other))
    ids = Tokenizer(bundle / "trunk").ids
    swapped = {**ids, "a": ids["b"], "b": ids["a"]}
    for folder in (None, base):
        with pytest.raises(BundleError, match="vocabulary"):
            load_draft_model(bundle, load_manifest(bundle), swapped, folder=folder, device="cpu")
    with pytest.raises(BundleError, match=r"no draft\.json and no config\.json"):
        load_draft_model(bundle, load_manifest(bundle), ids, folder=tmp_path, device="cpu")


def test_a_changed_draft_is_refused(bundle: Path, tmp_path: Path, run: Run) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    assert "draft model" in run("exporter", "inspect", copy).stdout
    weights = copy / "draft" / "draft.weights"
    data = bytearray(weights.read_bytes())
    data[1000] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BundleError, match=r"draft\.weights does not match"):
        load_draft_model(copy, load_manifest(copy), Tokenizer(copy / "trunk").ids, folder=None, device="cpu")


def test_transformers_runs_any_other_model(base: Path, bundle: Path) -> None:
    manifest, ids = load_manifest(bundle), Tokenizer(bundle / "trunk").ids
    model = load_draft_model(bundle, manifest, ids, folder=base, device="cpu")
    assert model is not None
    drafter = model.drafter()
    prompt = list(range(500, 530))
    guesses = [g.id for g in greedy(drafter, prompt, 3)]
    reference: Any = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = int(reference(torch.tensor([prompt])).logits[0, -1].argmax())
    assert guesses[0] == expected
    assert [g.id for g in greedy(drafter, [*prompt, guesses[0]], 2)] == guesses[1:]


@pytest.mark.parametrize("scheme", ["int4", "int8", "fp32"])
def test_a_mixtral_drafts_as_the_mean_of_its_experts(tmp_path: Path, scheme: Scheme) -> None:
    """Each expert is rounded first, as nodes have it; the reference rounds block by block."""
    model = save_mixtral(tmp_path, "float32")
    block = 32 if scheme != "fp32" else 0
    mean = ExpertMean(tmp_path, Quantisation(scheme=scheme, block=block))
    experts_of_layer = model.model.layers[1].mlp.experts
    both, downs = (experts_of_layer.gate_up_proj.detach().numpy(), experts_of_layer.down_proj.detach().numpy())
    gates, ups = both[:, :INTERMEDIATE], both[:, INTERMEDIATE:]
    for name, experts in (("gate", gates), ("up", ups), ("down", downs)):
        rounded = [_rounded(expert, {"int4": 4, "int8": 8}[scheme]) if block else expert for expert in experts]
        found = mean.tensor(f"model.layers.1.mlp.{name}_proj.weight").numpy()
        # Where a value lies between two codes, both are right.
        off = np.abs(found - np.mean(rounded, axis=0))
        assert np.mean(off > 1e-6) < 0.01, (scheme, name)
        assert off.max() < 0.02
    weight = model.model.layers[1].self_attn.q_proj.weight
    assert torch.equal(mean.tensor("model.layers.1.self_attn.q_proj.weight"), weight)
    assert (mean.shape.layers, mean.shape.vocab_size) == (len(model.model.layers), VOCABULARY)


def _rounded(matrix: np.ndarray[Any, np.dtype[np.float32]], bits: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Blocks of 32 columns, each with as many equal steps from its lowest to its highest value as there are codes."""
    rounded = matrix.copy()
    top = 2**bits - 1
    for row in rounded:
        for start in range(0, len(row), 32):
            part = row[start : start + 32].astype(np.float32)
            low, high = min(part.min(), np.float32(0)), max(part.max(), np.float32(0))
            scale = np.float32((high - low) / np.float32(top))
            zero = np.floor(-low / scale + np.float32(0.5))
            row[start : start + 32] = (np.clip(np.rint(part / scale) + zero, 0, top) - zero) * scale
    return rounded


def test_a_mixtral_is_exported_as_a_draft_model(tmp_path: Path, run: Run) -> None:
    save_mixtral(tmp_path / "model", "bfloat16")
    found = run("exporter", "draft", tmp_path / "draft", "--base", tmp_path / "model")
    assert found.returncode == 0, found.stderr
    ids = Tokenizer(tmp_path / "model").ids
    drafter = DraftGraph(tmp_path / "draft").drafter()
    assert all(token.id in ids.values() for token in greedy(drafter, [1, 2, 3], 4))
