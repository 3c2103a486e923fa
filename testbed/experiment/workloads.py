"""Runs the workload of one cell on a system that is ready."""

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from bs_coordinator.config import SamplingConfig
from bs_coordinator.engine.sequence import Sequence
from bs_coordinator.engine.speculation import Speculation
from bs_coordinator.selection import TopK
from testbed.errors import PlanError
from testbed.evaluation.data_sets import DomainText, LastWordItem, item_kind, read_items
from testbed.evaluation.scoring import EachAlone, choose, losses, score_last_words
from testbed.experiment.recorder import Recorder
from testbed.experiment.system_under_test import SystemUnderTest
from testbed.plan.cells import Cell
from testbed.plan.schema import Choice, Generate, Items, LastWord, Perplexity, Plan
from testbed.run_directory.result_tables import (
    ANSWERS,
    CHOICES,
    LAST_WORDS,
    LOSSES,
    AnswerRow,
    ChoiceRow,
    LastWordRow,
    LossRow,
)

Item = TypeVar("Item")
Result = TypeVar("Result")
_WARM_UP_PROMPT = "Say hello."


def warm_up(system: SystemUnderTest, tokens: int, recorder: Recorder) -> None:
    """Generate a few tokens that results leave out, to fill caches and settle link estimates."""
    if tokens:
        _answer(system, -1, -1, _WARM_UP_PROMPT, SamplingConfig(max_tokens=tokens), None, recorder)


def run_workload(system: SystemUnderTest, plan: Plan, cell: Cell, recorder: Recorder) -> None:
    """Run the whole workload of a cell.

    Raises:
        WdmoeError: the model failed, or the data can't be used.
    """
    workload = plan.workload(cell.workload)
    if isinstance(workload, Generate):
        # What speculation learnt with one policy must not help the next.
        draft = plan.draft_of(workload)
        speculation = system.base_station.speculation.restarted(draft) if system.base_station else None
        for answer, (number, prompt) in enumerate(workload.prompts_of(cell.repetition)):
            config = SamplingConfig(
                max_tokens=workload.max_tokens,
                temperature=workload.temperature,
                top_p=workload.top_p,
                seed=workload.seed + cell.repetition,
            )
            _answer(system, answer, number, prompt, config, speculation, recorder)
    elif isinstance(workload, Choice):
        items = _items(workload, item_kind(workload))
        chosen = _answered(system, workload, items, recorder, partial(choose, form=workload.form))
        for number, (item, choice) in enumerate(zip(items, chosen, strict=True), workload.span[0]):
            recorder.add(CHOICES, ChoiceRow(number, choice, item.label))
    elif isinstance(workload, LastWord):
        texts = _items(workload, LastWordItem)
        scored = _answered(system, workload, texts, recorder, score_last_words)
        for number, score in enumerate(scored, workload.span[0]):
            recorder.add(LAST_WORDS, LastWordRow(number, score.greedy, -score.log_likelihood))
    else:
        _read(system, workload, recorder)


def _answer(
    system: SystemUnderTest,
    answer: int,
    number: int,
    prompt: str,
    config: SamplingConfig,
    speculation: Speculation | None,
    recorder: Recorder,
) -> None:
    tokenizer = system.tokenizer
    if tokenizer.has_chat_template:
        ids = tokenizer.encode_chat([{"role": "user", "content": prompt}])
    else:
        ids = tokenizer.encode(prompt)
    new: list[int] = []
    texts: list[str] = []
    first_ns, stop = 0, None
    began_ns = time.perf_counter_ns()
    for event in Sequence(system.model, tokenizer, speculation=speculation).generate(ids, config):
        first_ns = first_ns or time.perf_counter_ns() - began_ns
        recorder.token(answer, len(new), event.steps, id=event.id, warm_up=answer < 0)
        new.append(event.id)
        texts.append(event.text)
        stop = event.stop
    wall_ns = time.perf_counter_ns() - began_ns
    row = AnswerRow(
        answer=answer,
        prompt=number,
        prompt_tokens=len(ids),
        ids=new,
        text="".join(texts),
        first_token_ns=first_ns,
        wall_ns=wall_ns,
        stop=stop,
    )
    recorder.add(ANSWERS, row)


def _items(workload: Items, kind: type[Item]) -> list[Item]:
    """The items of a workload.

    Raises:
        PlanError: the data set has too few.
    """
    first, end = workload.span
    items = read_items(Path(workload.dataset), kind, end)[first:]
    if len(items) < end - first:
        raise PlanError(
            f"{workload.dataset} has {first + len(items)} items, but workload '{workload.name}' needs {end}"
        )
    return items


def _answered(
    system: SystemUnderTest,
    workload: Items,
    items: list[Item],
    recorder: Recorder,
    answer: Callable[..., list[Result]],
) -> list[Result]:
    """The model's answer to each item; steps are recorded by batch.

    Args:
        answer: takes model, tokenizer, some of the items and `batch`; returns an answer per item.
    """
    policy = system.model.policy
    # Top-k chooses the same over all links, so its choices are evaluated once.
    reusable = system.local is not None and isinstance(policy, TopK)
    key = workload.name, policy
    answers: list[Result] = system.answers.get(key, []) if reusable else []
    if workload.choosing == "alone" and not reusable:
        system.model.policy = EachAlone(policy)  # the next cell sets its own policy
    for start in range(len(answers), len(items), workload.batch):
        with _steps(system, recorder, start // workload.batch):
            answers += answer(
                system.model, system.tokenizer, items[start : start + workload.batch], batch=workload.batch
            )
    if reusable:
        system.answers[key] = answers
    return answers


def _read(system: SystemUnderTest, workload: Perplexity, recorder: Recorder) -> None:
    if workload.dataset is None:
        assert isinstance(workload.texts, tuple)  # noqa: S101 (checked when the plan was read)
        texts = [DomainText("plan", text) for text in workload.texts]
    else:
        by_domain: dict[str, list[DomainText]] = defaultdict(list)
        for text in read_items(Path(workload.dataset), DomainText):
            if isinstance(workload.texts, int) and len(by_domain[text.domain]) < workload.texts:
                by_domain[text.domain].append(text)
        texts = [text for _, some in sorted(by_domain.items()) for text in some]
    for i, text in enumerate(texts):
        with _steps(system, recorder, i):
            ((loss, tokens),) = losses(system.model, system.tokenizer, [text.text], tokens=workload.tokens)
        recorder.add(LOSSES, LossRow(i, text.domain, loss, tokens))


@contextmanager
def _steps(system: SystemUnderTest, recorder: Recorder, answer: int) -> Iterator[None]:
    """Record the model's steps as the tokens of one answer for the duration of the context."""
    numbers = itertools.count()
    system.model.observe = lambda record: recorder.token(answer, next(numbers), (record,))
    try:
        yield
    finally:
        system.model.observe = lambda record: None
