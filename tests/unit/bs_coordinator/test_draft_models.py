"""Dense draft models of several architectures: right tokens after rollbacks, or refused when they are loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bs_coordinator.engine.speculation.dense import DenseModel
from tests.drafts import greedy
from wire.errors import BundleError

SIZES = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
    "num_key_value_heads": 2, "vocab_size": 50, "initializer_range": 0.3, "max_position_embeddings": 64,
}  # fmt: skip


def _saved(folder: Path, family: str, **options: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **options)).eval()
    model.save_pretrained(folder)
    return model


@torch.inference_mode()
def _continued(model: Any, ids: list[int], tokens: int) -> list[int]:
    """Greedy tokens without a cache."""
    text = list(ids)
    for _ in range(tokens):
        text.append(int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    return text[len(ids) :]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mistral", {"sliding_window": 5}),
        ("gemma3_text", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    ],
)
def test_draft_tokens_are_the_models_own_after_wrong_ones_were_taken_back(
    tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    model = _saved(tmp_path, family, **options)
    drafter = DenseModel(tmp_path).drafter()
    for length in (12, 5, 29, 7, 31):  # shorter and longer than what was read before, and than the window
        ids = [7 * i % 49 + 1 for i in range(length)]
        assert [token.id for token in greedy(drafter, ids, 6)] == _continued(model, ids, 6)


@pytest.mark.parametrize(
    ("family", "options"),
    [("lfm2", {"layer_types": ["conv", "full_attention"]}), ("mamba2", {"n_groups": 1, "num_heads": 8})],
)
def test_a_draft_model_that_cant_take_back_tokens_is_refused(
    tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    _saved(tmp_path, family, **options)
    with pytest.raises(BundleError, match=f"a '{family}' model has read can't be taken back.*sliding-window attention"):
        DenseModel(tmp_path)
