"""Many sequences at once: each gets what it would get alone, and others' failures are not its own."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bs_coordinator.config import SamplingConfig
from bs_coordinator.engine.experts import Ready
from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.engine.scheduler import Scheduler
from bs_coordinator.engine.sequence import GeneratedAnswer, Sequence
from bs_coordinator.engine.speculation import Speculation
from bs_coordinator.engine.tokenizer import Tokenizer
from bs_coordinator.errors import AnswerError, DispatchError
from bs_coordinator.selection import TopK
from bs_coordinator.trunk.load import load_trunk
from common.errors import WdmoeError
from testbed.evaluation.local_experts import LocalExperts
from tests.checkpoints import VOCABULARY
from wire.tensors import Array, WireDtype


class _Experts(LocalExperts):
    """Fails for batches with more than `most_rows` rows."""

    most_rows = 10**6

    def begin(self, layer: int, hidden: Array, gate: Array) -> Ready:
        if len(hidden) > self.most_rows:
            raise DispatchError("too many rows")
        return super().begin(layer, hidden, gate)


@pytest.fixture(scope="module")
def experts(random_bundle: Path) -> _Experts:
    return _Experts(random_bundle, threads=1, wire=WireDtype.FP16)


@pytest.fixture(scope="module")
def model(random_bundle: Path, experts: _Experts) -> DistributedModel:
    return DistributedModel(load_trunk(random_bundle / "trunk"), experts, TopK(2))


@pytest.fixture(scope="module")
def tokenizer(random_bundle: Path) -> Tokenizer:
    return Tokenizer(random_bundle / "trunk")


def _prompts(count: int) -> list[list[int]]:
    """Prompts of 1 to 40 tokens, so that some go through the trunk as rows and some as blocks."""
    rng = np.random.default_rng(5)
    return [rng.integers(1, VOCABULARY, int(rng.integers(1, 41))).tolist() for _ in range(count)]


def _run(scheduler: Scheduler, answers: list[GeneratedAnswer]) -> list[list[int]]:
    ids: list[list[int]] = [[] for _ in answers]
    while not scheduler.idle:
        for answer, events, error, _ in scheduler.step():
            assert error is None
            ids[answers.index(answer)] += [event.id for event in events]
    return ids


def test_batched_answers_equal_those_computed_alone(model: DistributedModel, tokenizer: Tokenizer) -> None:
    config = SamplingConfig(max_tokens=8)
    prompts = _prompts(8)
    alone = [[e.id for e in Sequence(model, tokenizer).generate(ids, config)] for ids in prompts]
    assert len({tuple(ids) for ids in alone}) > 5
    scheduler = Scheduler(model, max_live=4)
    answers = [Sequence(model, tokenizer).answer(ids, config) for ids in prompts]
    for answer in answers:
        scheduler.add(answer)
    assert _run(scheduler, answers) == alone


def test_look_ups_change_nothing(model: DistributedModel, tokenizer: Tokenizer) -> None:
    config = SamplingConfig(max_tokens=24)
    speculation = Speculation("ngram")
    for ids in _prompts(3):
        plain = [e.id for e in Sequence(model, tokenizer).generate(ids, config)]
        drafted = list(Sequence(model, tokenizer, speculation=speculation).generate(ids, config))
        assert [e.id for e in drafted] == plain
        assert sum(len(e.steps) for e in drafted) <= len(plain)


def test_a_long_prompt_does_not_starve_decoding_answers(model: DistributedModel, tokenizer: Tokenizer) -> None:
    scheduler = Scheduler(model, prefill_tokens=20)
    short = Sequence(model, tokenizer).answer([5, 6, 7], SamplingConfig(max_tokens=20))
    scheduler.add(short)
    scheduler.step()
    long = Sequence(model, tokenizer).answer([1 + i % 40 for i in range(100)], SamplingConfig(max_tokens=2))
    scheduler.add(long)
    for _ in range(4):
        by_answer = {p.answer: p.events for p in scheduler.step()}
        assert len(by_answer[short]) == 1
        assert by_answer[long] == []
    assert len({p.answer: p.events for p in scheduler.step()}[long]) == 1
    scheduler.cancel(short)
    assert [p.answer for p in scheduler.step()] == [long]
    assert scheduler.idle


def test_a_failure_ends_only_the_answer_that_fails_alone(
    model: DistributedModel, tokenizer: Tokenizer, experts: _Experts
) -> None:
    config = SamplingConfig(max_tokens=3)
    expected = [e.id for e in Sequence(model, tokenizer).generate([5, 6, 7], config)]
    scheduler = Scheduler(model)
    small = Sequence(model, tokenizer).answer([5, 6, 7], config)
    large = Sequence(model, tokenizer).answer([1 + i % 40 for i in range(50)], config)
    scheduler.add(large)
    scheduler.add(small)
    experts.most_rows = 20
    try:
        failed = {p.answer: p.error for p in scheduler.step()}
        first = [e.id for p in scheduler.step() for e in p.events]
    finally:
        experts.most_rows = 10**6
    assert isinstance(failed[large], DispatchError)
    assert failed[small] is None
    assert first == expected[1:2]


FEW = SamplingConfig(max_tokens=4)
THREE = [[5, 6, 7], [9, 8] * 15, [11]]


@pytest.fixture(scope="module")
def alone(model: DistributedModel, tokenizer: Tokenizer) -> list[list[int]]:
    return [[e.id for e in Sequence(model, tokenizer).generate(ids, FEW)] for ids in THREE]


def _fail(*_: object, **__: object) -> None:
    raise IndexError("index 7 is out of bounds")


def _break_sampler(answer: GeneratedAnswer, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(answer._sampler, "choose", _fail)


def _break_decoder(answer: GeneratedAnswer, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(answer._stream, "push", _fail)


class _Panic(BaseException):
    """As the tokenizers library raises it: not an `Exception`."""

    __module__ = "pyo3_runtime"


def _panic_in_decoder(answer: GeneratedAnswer, patch: pytest.MonkeyPatch) -> None:
    class Decoder:
        def step(self, *_: object) -> str:
            raise _Panic("index out of bounds")

    patch.setattr(answer._stream, "_stream", Decoder())


def _break_input(answer: GeneratedAnswer, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(answer, "next_input", _fail)


def _break_cache(answer: GeneratedAnswer, patch: pytest.MonkeyPatch) -> None:
    for layer in answer._sequence.cache.layers:
        patch.setattr(layer, "update", _fail)


def _break_last_layer_and_cropping(answer: GeneratedAnswer, patch: pytest.MonkeyPatch) -> None:
    first, *_, last = answer._sequence.cache.layers
    patch.setattr(last, "update", _fail)
    patch.setattr(first, "crop", _fail)


def _break_ids(answer: GeneratedAnswer, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(answer, "_pending", [10**9])


def _break_logits(answer: GeneratedAnswer, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(answer._sampler, "_greedy", False)
    patch.setattr(answer._sampler, "_probabilities", lambda logits: logits * float("nan"))


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    "break_answer",
    [
        _break_sampler, _break_decoder, _panic_in_decoder, _break_input, _break_cache,
        _break_last_layer_and_cropping, _break_ids, _break_logits,
    ],
)  # fmt: skip
def test_a_library_that_fails_for_one_answer_leaves_the_others_as_they_are(
    model: DistributedModel,
    tokenizer: Tokenizer,
    alone: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    break_answer: Callable[[GeneratedAnswer, pytest.MonkeyPatch], None],
    place: int,
    after: int,
) -> None:
    scheduler = Scheduler(model)
    answers = [Sequence(model, tokenizer).answer(ids, FEW) for ids in THREE]
    for answer in answers:
        scheduler.add(answer)
    ids: dict[GeneratedAnswer, list[int]] = {answer: [] for answer in answers}
    errors: dict[GeneratedAnswer, WdmoeError] = {}
    for step in itertools.count():
        if step == after:
            break_answer(answers[place], monkeypatch)
        if scheduler.idle:
            break
        for answer, events, error, _ in scheduler.step():
            ids[answer] += [event.id for event in events]
            if error:
                errors[answer] = error
    assert list(errors) == [answers[place]]
    assert isinstance(errors[answers[place]], AnswerError)
    assert str(errors[answers[place]]).startswith("this answer failed: ")
    assert "\n" not in str(errors[answers[place]])
    others = [(ids[a], expected) for i, (a, expected) in enumerate(zip(answers, alone, strict=True)) if i != place]
    assert [made for made, _ in others] == [expected for _, expected in others]


def test_answers_with_different_policies_take_turns_and_equal_those_alone(
    model: DistributedModel, tokenizer: Tokenizer
) -> None:
    config = SamplingConfig(max_tokens=6)
    policies = [None, TopK(1), None, TopK(3)]
    prompts = _prompts(4)
    alone = []
    for ids, policy in zip(prompts, policies, strict=True):
        own = DistributedModel(model.trunk, model._experts, policy or TopK(2))
        alone.append([e.id for e in Sequence(own, tokenizer).generate(ids, config)])
    scheduler = Scheduler(model)
    answers = [
        Sequence(model, tokenizer).answer(ids, config, policy=policy)
        for ids, policy in zip(prompts, policies, strict=True)
    ]
    for answer in answers:
        scheduler.add(answer)
    first = [{answers.index(p.answer) for p in scheduler.step()} for _ in range(3)]
    assert first == [{0, 2}, {1}, {3}]
    assert model.policy == TopK(2)
    rest = _run(scheduler, answers)
    assert [ids[1:] for ids in alone] == rest
