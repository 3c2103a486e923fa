"""Models whose tokens depend on the length of a sequence or on a window: alone and together, after a rollback."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from bs_coordinator.config import SamplingConfig
from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.engine.scheduler import Scheduler
from bs_coordinator.engine.sequence import Sequence
from bs_coordinator.selection import TopK
from bs_coordinator.trunk.generic import GenericTrunk
from bs_coordinator.trunk.inputs import SequenceInput
from bs_coordinator.trunk.llama import LlamaTrunk
from testbed.demo_assets import export_demo_bundle
from testbed.evaluation.local_experts import LocalExperts
from tests.text_models import save_tokenizer

_LONG = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 12}
CONFIGS: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
    "longrope": {"rope_parameters": {"rope_type": "longrope", "factor": 4.0, "rope_theta": 1e4, **_LONG}},
    "window": {"sliding_window": 5},
}
# Dynamic scaling starts at `max_position_embeddings`, which is also the context's length here.
POSITIONS = {"dynamic": 12}
SHORT, LONG = [5, 6, 7], list(range(8, 26))


@pytest.fixture(scope="module", params=[(name, kind) for kind in (LlamaTrunk, GenericTrunk) for name in CONFIGS])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, DistributedModel]:
    name, kind = request.param
    folder: Path = tmp_path_factory.mktemp(name)
    size = len(save_tokenizer(folder / "model", "sentencepiece"))
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=size, initializer_range=0.3,
        max_position_embeddings=POSITIONS.get(name, 64), eos_token_id=None, **CONFIGS[name],
    )  # fmt: skip
    reference = MixtralForCausalLM(config).eval()
    reference.save_pretrained(folder / "model")
    export_demo_bundle(folder / "model", folder / "bundle", "fp32")
    trunk = kind(folder / "bundle/trunk")
    model = DistributedModel(trunk, LocalExperts(folder / "bundle", threads=1), TopK(2))
    return reference, model


def _sequence(model: DistributedModel, tokenizer: Any) -> Sequence:
    sequence = Sequence(model, tokenizer)
    sequence.max_positions = 64
    return sequence


class _NoText:
    """A tokenizer of which only ids matter."""

    eos_ids: frozenset[int] = frozenset()

    def stream(self, continued: Any) -> "_NoText":
        return self

    def push(self, id: int) -> str:
        return ""


def _ids(sequence: Sequence, prompt: list[int], count: int = 14) -> list[int]:
    return [event.id for event in sequence.generate(prompt, SamplingConfig(max_tokens=count))]


@torch.inference_mode()
def _reference_ids(reference: Any, prompt: list[int], count: int = 14) -> list[int]:
    from transformers import DynamicCache

    cache, fed, found = DynamicCache(), prompt, []
    for _ in range(count):
        logits = reference(torch.tensor([fed]), past_key_values=cache).logits
        fed = [int(logits[0, -1].argmax())]
        found += fed
    return found


@pytest.mark.parametrize("prompt", [SHORT, LONG])
def test_answers_are_those_of_transformers(made: tuple[Any, DistributedModel], prompt: list[int]) -> None:
    reference, model = made
    # A short sequence first resets what the reference keeps of a longer one.
    reference(torch.tensor([[1]]))
    assert _ids(_sequence(model, _NoText()), prompt) == _reference_ids(reference, prompt)


def test_an_answer_is_the_same_beside_a_longer_one(made: tuple[Any, DistributedModel]) -> None:
    _, model = made
    alone = [_ids(_sequence(model, _NoText()), prompt) for prompt in (SHORT, LONG)]
    scheduler = Scheduler(model)
    answers = [_sequence(model, _NoText()).answer(p, SamplingConfig(max_tokens=14)) for p in (SHORT, LONG)]
    found: dict[int, list[int]] = {id(answer): [] for answer in answers}
    for answer in answers:
        scheduler.add(answer)
    while not scheduler.idle:
        for progress in scheduler.step():
            found[id(progress.answer)] += [event.id for event in progress.events]
    assert list(found.values()) == alone


def test_a_second_turn_is_what_it_is_from_the_start(made: tuple[Any, DistributedModel]) -> None:
    _, model = made
    sequence = _sequence(model, _NoText())
    first = _ids(sequence, SHORT)
    for second in ([*SHORT, *first[:6], 9, 10, 11], SHORT, [*SHORT, 30]):
        assert _ids(sequence, second) == _ids(_sequence(model, _NoText()), second)


def test_tokens_that_branch_give_what_each_branch_gives_alone(made: tuple[Any, DistributedModel]) -> None:
    _, model = made
    if not model.trunk.batch_invariant:
        pytest.skip("this trunk takes no branches")
    begin = LONG[:10]

    def logits_of(ids: list[int], parents: list[int] | None = None) -> torch.Tensor:
        cache = model.trunk.new_cache()
        model.step([SequenceInput(begin, cache)])
        (logits,), _ = model.step([SequenceInput(ids, cache, rows=list(range(len(ids))), parents=parents)])
        return logits

    tree = logits_of([5, 6, 8, 13, 14], [-1, 0, 1, 0, 3])
    for row, chain in enumerate(([5], [5, 6], [5, 6, 8], [5, 13], [5, 13, 14])):
        assert torch.equal(tree[row], logits_of(chain)[-1])
