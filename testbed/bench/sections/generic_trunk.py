"""transformers' own model as the trunk against the blocks written for it, on the demo model and this CPU, in turns."""

import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bs_coordinator.config import SamplingConfig
from bs_coordinator.engine.experts import ExpertOutput, Ready
from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.engine.sequence import Sequence, TokenEvent
from bs_coordinator.engine.tokenizer import Tokenizer
from bs_coordinator.selection import TopK
from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.trunk.generic import GenericTrunk
from bs_coordinator.trunk.inputs import SequenceInput
from bs_coordinator.trunk.interface import Trunk
from bs_coordinator.trunk.llama import LlamaTrunk
from common.cores import usable_cores
from testbed.bench.instant_experts import InstantExperts
from testbed.bench.rows import Result, Row, Settings, in_turns
from testbed.demo_assets import demo_bundle
from testbed.evaluation.local_experts import LocalExperts
from testbed.prompts import PROMPTS
from wire.manifest import Dims, load_manifest
from wire.tensors import Array

_PAST_TOKENS = 48
_ANSWERS = 8
_TOKENS = 64
_FLOOR = "its own blocks"
# Layers of Qwen1.5-MoE-A2.7B's size, with a small vocabulary.
_SHARED = {
    "hidden_size": 2048, "shared_expert_intermediate_size": 5632, "num_hidden_layers": 2, "num_attention_heads": 16,
    "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 8,
    "vocab_size": 512, "max_position_embeddings": 512,
}  # fmt: skip
_AWAY_S = 0.02


def measure(settings: Settings) -> Iterator[Result]:
    """Yield rows for a prompt, for single tokens, and for answers with experts in this process."""
    bundle = demo_bundle("int4", console=settings.console)
    dims = load_manifest(bundle).dims
    generic, own = GenericTrunk(bundle / "trunk"), LlamaTrunk(bundle / "trunk")
    parameters = {"bundle": bundle.name, "torch": torch.__version__, "threads": torch.get_num_threads()}
    for tokens, name in ((1, "one token"), (128, "a prompt of 128 tokens")):
        steps = [_stepper(trunk, dims, tokens) for trunk in (generic, own)]
        ours, floor = in_turns(steps[0], steps[1], max(20, settings.samples // tokens))
        yield Row(
            f"{name} through transformers' model, instant experts", _FLOOR, ours, floor, None,
            parameters | {"past_tokens": _PAST_TOKENS},
        )  # fmt: skip
    yield _answers(demo_bundle("fp32", console=settings.console), generic, own, parameters)
    yield _shared_experts(settings)


def _stepper(trunk: Trunk, dims: Dims, tokens: int) -> Any:
    """A step that always runs after the same past."""
    model = DistributedModel(trunk, InstantExperts(dims.experts, dims.hidden), TopK(dims.top_k))
    cache = trunk.new_cache()
    model.step([SequenceInput(list(range(_PAST_TOKENS)), cache)])

    def step() -> None:
        model.step([SequenceInput([7] * tokens, cache)])
        trunk.truncate(cache, _PAST_TOKENS)

    return step


def _answers(bundle: Path, generic: Trunk, own: Trunk, parameters: dict[str, Any]) -> Row:
    """Greedy answers by both, token by token in turns, and whether they are the same.

    Experts are fp32: quantised ones round activations, which makes differences in the last bit as large as the
    quantisation's own error.
    """
    experts, tokenizer = LocalExperts(bundle, threads=usable_cores()), Tokenizer(bundle / "trunk")
    top_k = load_manifest(bundle).dims.top_k
    models = [DistributedModel(trunk, experts, TopK(top_k)) for trunk in (generic, own)]
    times: tuple[list[float], list[float]] = ([], [])
    same = total = 0
    for number, text in enumerate(PROMPTS[:_ANSWERS]):
        prompt = tokenizer.encode_chat([{"role": "user", "content": text}])
        config = SamplingConfig(max_tokens=_TOKENS)
        answers = [Sequence(model, tokenizer).generate(prompt, config) for model in models]
        ids: tuple[list[int], list[int]] = ([], [])
        for turn in itertools.count(number):
            events: list[TokenEvent | None] = [None, None]
            for i in (0, 1) if turn % 2 else (1, 0):
                began = time.perf_counter_ns()
                event = events[i] = next(answers[i], None)
                if event is not None and ids[i]:
                    times[i].append((time.perf_counter_ns() - began) / 1e6)
                if event is not None:
                    ids[i].append(event.id)
            if events == [None, None]:
                break
        same += ids[0] == ids[1]
        total += len(ids[1])
    return Row(
        "answers through transformers' model, experts in this process", _FLOOR, *times, None,
        parameters | {"answers": _ANSWERS, "tokens": total, "same_answers": same},
    )  # fmt: skip


class _Away:
    """Experts whose answers, zeros, arrive after a while."""

    def __init__(self, experts: int, hidden: int) -> None:
        self._instant = InstantExperts(experts, hidden)

    def begin(self, layer: int, hidden: Array, gate: Array) -> "_Answer":
        return _Answer(self._instant.begin(layer, hidden, gate), time.monotonic() + _AWAY_S)

    def forecast(self, layer: int) -> LayerForecast:
        return self._instant.forecast(layer)


class _Answer(NamedTuple):
    ready: Ready
    due: float

    def result(self) -> ExpertOutput:
        time.sleep(max(0.0, self.due - time.monotonic()))
        return self.ready.result()

    def cancel(self) -> None:
        """Nothing to give up."""


def _shared_experts(settings: Settings) -> Row:
    """A token through layers with shared experts, computed while the others are awaited and before they are asked."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory(prefix="wdmoe-shared-") as folder:
        AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2_moe", **_SHARED)).save_pretrained(folder)
        trunk = GenericTrunk(Path(folder))
    model = DistributedModel(trunk, _Away(int(_SHARED["num_experts"]), int(_SHARED["hidden_size"])), TopK(4))
    cache = trunk.new_cache()
    beside = [module for layer in trunk.beside for module in layer]

    def step() -> None:
        model.step([SequenceInput([7], cache)])
        trunk.truncate(cache, 0)

    def step_in_order() -> None:
        for module in beside:
            module.remove()
        step()
        for module in beside:
            module.install()

    ours, floor = in_turns(step, step_in_order, max(20, settings.samples // 10), warm_up=5)
    return Row(
        f"one token, shared experts while others are awaited for {1000 * _AWAY_S:.0f} ms",
        "shared experts before others are asked", ours, floor, None,
        {"layers": trunk.layers, "beside": len(beside), **_SHARED},
    )  # fmt: skip
