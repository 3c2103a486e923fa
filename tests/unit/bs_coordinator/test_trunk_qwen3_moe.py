"""The trunk with per-head norms of queries and keys against transformers' Qwen3MoeForCausalLM."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from bs_coordinator.config import TrunkDtype
from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.selection import TopK
from bs_coordinator.trunk.inputs import SequenceInput
from bs_coordinator.trunk.llama import LlamaTrunk, why_not_llama
from tests.unit.bs_coordinator.test_trunk import ReferenceExperts

TOP_K = 3


def _checkpoint(folder: Path, **changes: object) -> Any:
    """A random model whose norms are not those of a fresh one; only its trunk is saved."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 48,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 8,
        "num_experts_per_tok": TOP_K, "max_position_embeddings": 256, "initializer_range": 0.1, **changes,
    }  # fmt: skip
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.uniform_(0.3, 3.0)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    trunk = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    save_file(trunk, folder / "model.safetensors", {"format": "pt"})
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_topk_prob": True},
        {"norm_topk_prob": False},
        {"norm_topk_prob": True, "use_sliding_window": True, "sliding_window": 16, "tie_word_embeddings": True},
    ],
    ids=["renormalised", "not-renormalised", "window"],
)
def test_steps_are_transformers_steps(tmp_path: Path, changes: dict[str, object]) -> None:
    """Prefill in blocks, a few tokens as rows, and single tokens."""
    reference = _checkpoint(tmp_path, **changes)
    ids = torch.randint(0, 128, (60,)).tolist()
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0]
    trunk = LlamaTrunk(tmp_path)
    model = DistributedModel(trunk, ReferenceExperts(reference), TopK(TOP_K))
    cache = trunk.new_cache()
    pieces = [ids[:30], ids[30:43], *([i] for i in ids[43:])]
    logits = torch.cat([model.step([SequenceInput(piece, cache)], all_logits=True)[0][0] for piece in pieces])
    assert float((logits - expected).norm() / expected.norm()) <= 1e-5
    assert logits.argmax(dim=-1).tolist() == expected.argmax(dim=-1).tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), ("bf16", 0.03)])
def test_graphs_are_the_eager_steps(tmp_path: Path, dtype: TrunkDtype, tolerance: float) -> None:
    reference = _checkpoint(
        tmp_path,
        hidden_size=512,
        num_attention_heads=8,
        head_dim=64,
        max_position_embeddings=1024,
        norm_topk_prob=False,
    )
    ids = torch.randint(0, 128, (300,)).tolist()
    results = []
    for graphs in (True, False):
        trunk = LlamaTrunk(tmp_path, device="cuda", dtype=dtype, graphs=graphs)
        model = DistributedModel(trunk, ReferenceExperts(reference), TopK(TOP_K))
        cache = trunk.new_cache()
        assert (trunk.graphs([SequenceInput(ids[:1], cache)]) is not None) is graphs
        model.step([SequenceInput(ids[:250], cache)])
        results.append(torch.cat([model.step([SequenceInput([i], cache)])[0][0] for i in ids[250:]]))
    assert float((results[0] - results[1]).norm() / results[1].norm()) <= tolerance


def test_a_token_is_bitwise_the_same_alone_in_a_draft_and_in_a_batch(tmp_path: Path) -> None:
    _checkpoint(tmp_path, norm_topk_prob=True)
    trunk = LlamaTrunk(tmp_path)
    assert trunk.batch_invariant
    ids = torch.randint(0, 128, (60,)).tolist()

    def through_the_trunk(sequences: list[SequenceInput]) -> list[list[torch.Tensor]]:
        """What the trunk computes for each token of the last sequence; the experts' outputs are the inputs halved."""
        trunk_pass, count = trunk.start_pass(sequences), len(sequences[-1].ids)
        seen = []
        for layer in range(trunk.layers):
            hidden, routing = trunk_pass.attend(layer)
            seen += [torch.from_numpy(x[-count:].copy()) for x in (hidden, routing.weights)]
            trunk_pass.add(hidden * np.float32(0.5))
        seen.append(trunk_pass.logits(all_logits=True)[-1])
        return [[x[i] for x in seen] for i in range(count)]

    alone, other = trunk.new_cache(), trunk.new_cache()
    through_the_trunk([SequenceInput(ids[:30], alone)])
    through_the_trunk([SequenceInput(ids[10:50], other)])
    expected = [through_the_trunk([SequenceInput([id], alone)])[0] for id in ids[30:46]]
    for count in (2, 3, 5, 8, 9, 16):
        trunk.truncate(alone, 30)
        found = through_the_trunk([SequenceInput([ids[7]], other), SequenceInput(ids[30 : 30 + count], alone)])
        for token, one in zip(found, expected[:count], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(token, one, strict=True)), count


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention_bias": True}, "biases"),
        ({"mlp_only_layers": [1]}, "no experts"),
        ({"decoder_sparse_step": 2}, "no experts"),
    ],
)
def test_models_that_it_would_run_wrongly_take_another_trunk(changes: dict[str, Any], reason: str) -> None:
    assert reason in why_not_llama(Qwen3MoeConfig(**changes).to_dict())
    assert "Mixtral" in why_not_llama({"model_type": "gpt_oss"})
    assert why_not_llama({"model_type": "mixtral"}) == ""
