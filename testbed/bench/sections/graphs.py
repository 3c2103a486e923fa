"""A few tokens through trunks of the demo models' sizes on a GPU: captured graphs against eager modules, in turns.

One token, drafts of a sequence, and tokens of several sequences. Weights are random, so no demo model is needed on the
machine; answers of both are compared token by token, and logits of the steps with several tokens.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from bs_coordinator.engine.experts import ExpertOutput, Ready
from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.selection import TopK
from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.trunk.inputs import SequenceInput
from bs_coordinator.trunk.llama import LlamaTrunk
from testbed.bench.rows import Result, Row, Settings, Skipped, in_turns
from wire.tensors import Array

_SIZE = {
    "vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    # Only the trunk is kept.
    "intermediate_size": 8, "moe_intermediate_size": 8,
}  # fmt: skip
_MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 16, "num_experts_per_tok": 4, "norm_topk_prob": True},
}
_PROMPT_TOKENS = 48
_ANSWERS = 4
_TOKENS = 64
_SEVERAL = ((1, 4), (1, 8), (4, 1), (8, 1), (4, 4))
"""Sequences of a step, and tokens of each."""


def measure(settings: Settings, *, device: str = "cuda") -> Iterator[Result]:
    """Yield a row for each demo model.

    Args:
        device: as torch names it.
    """
    if device == "cuda" and not torch.cuda.is_available():
        yield Skipped("one token through captured graphs", "torch sees no CUDA GPU")
        return
    for family, facts in _MODELS.items():
        with tempfile.TemporaryDirectory(prefix="wdmoe-graphs-") as folder:
            _random_trunk(Path(folder), family, facts)
            # In fp32, in which both round so little that no token of an answer depends on it.
            trunks = [LlamaTrunk(Path(folder), device=device, graphs=graphs) for graphs in (True, False)]
        if trunks[0].graphs([SequenceInput([0], trunks[0].new_cache())]) is None and device == "cuda":
            yield Skipped(f"{family}, one token through captured graphs", "the graphs don't fit this model and GPU")
            continue
        graphed, eager = (
            DistributedModel(trunk, _Experts(trunk), TopK(facts["num_experts_per_tok"])) for trunk in trunks
        )
        yield _row(family, graphed, eager, settings)
        yield from (_several(family, graphed, eager, settings, *shape) for shape in _SEVERAL)


def _row(family: str, graphed: DistributedModel, eager: DistributedModel, settings: Settings) -> Row:
    prompts = _prompts(_ANSWERS)
    same = sum(_greedy(graphed, prompt) == _greedy(eager, prompt) for prompt in prompts)
    steps = _Step(graphed, prompts[:1]), _Step(eager, prompts[:1])
    ours, floor = in_turns(*steps, max(20, settings.samples // 3))
    parameters = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none", "torch": torch.__version__,
        "past_tokens": _PROMPT_TOKENS, "answers": _ANSWERS, "same_answers": same,
    }  # fmt: skip
    name = f"{family}, one token of the demo model's size, fp32, captured graphs"
    return Row(
        f"{name}; {same} of {_ANSWERS} answers of {_TOKENS} tokens are the same",
        "eager modules", ours, floor, None, parameters,
    )  # fmt: skip


def _several(
    family: str, graphed: DistributedModel, eager: DistributedModel, settings: Settings, sequences: int, tokens: int
) -> Row:
    prompts = _prompts(sequences)
    steps = _Step(graphed, prompts, tokens), _Step(eager, prompts, tokens)
    found, expected = (torch.cat(step()) for step in steps)
    apart = float((found - expected).norm() / expected.norm())
    ours, floor = in_turns(*steps, max(10, settings.samples // 10))
    parameters = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none", "torch": torch.__version__,
        "past_tokens": _PROMPT_TOKENS, "sequences": sequences, "tokens": tokens, "logits_apart": apart,
    }  # fmt: skip
    name = f"{family}, {sequences} sequences with {tokens} tokens each, fp32, captured graphs"
    return Row(f"{name}; logits differ by {apart:.1e} of their norm", "eager modules", ours, floor, None, parameters)


class _Experts:
    """Experts that answer at once with a vector of their own, weighed: answers depend on what the gate decides."""

    def __init__(self, trunk: LlamaTrunk) -> None:
        config = trunk.config
        shape = (trunk.layers, config.num_local_experts, config.hidden_size)
        self._vectors = np.random.default_rng(1).standard_normal(shape, np.float32)
        self._forecast = LayerForecast.even(0, config.num_local_experts)

    def begin(self, layer: int, hidden: Array, gate: Array) -> Ready:
        return Ready(ExpertOutput(0.5 * gate @ self._vectors[layer] + 0.5 * hidden))

    def forecast(self, layer: int) -> LayerForecast:
        return self._forecast


class _Step:
    """A step that always runs after the same past: some new tokens of each sequence."""

    def __init__(self, model: DistributedModel, prompts: Sequence[Sequence[int]], tokens: int = 1) -> None:
        self._model, self._ids = model, list(range(7, 7 + tokens))
        self._caches = [model.trunk.new_cache() for _ in prompts]
        for prompt, cache in zip(prompts, self._caches, strict=True):
            model.step([SequenceInput(list(prompt), cache)])

    def __call__(self) -> list[torch.Tensor]:
        logits, _ = self._model.step([SequenceInput(self._ids, cache) for cache in self._caches], all_logits=True)
        for cache in self._caches:
            self._model.trunk.truncate(cache, _PROMPT_TOKENS)
        return logits


def _prompts(count: int) -> list[list[int]]:
    prompts: list[list[int]] = np.random.default_rng(0).integers(0, 49152, (count, _PROMPT_TOKENS)).tolist()
    return prompts


def _greedy(model: DistributedModel, prompt: Sequence[int]) -> list[int]:
    cache, ids = model.trunk.new_cache(), list(prompt)
    answer: list[int] = []
    for _ in range(_TOKENS):
        (logits,), _record = model.step([SequenceInput(ids, cache)])
        ids = [int(logits[-1].argmax())]
        answer += ids
    return answer


def _random_trunk(folder: Path, family: str, facts: dict[str, Any]) -> None:
    """Write a trunk with random weights, and norms that are not those of a fresh model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **_SIZE, **facts))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.uniform_(0.5, 2.0)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    trunk = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    save_file(trunk, folder / "model.safetensors", {"format": "pt"})
