"""Running one cell's workload on a model that is ready."""

import hashlib
import itertools
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from bs_coordinator.config import SamplingConfig
from bs_coordinator.engine.sequence import Sequence
from bs_coordinator.engine.speculation import Speculation
from bs_coordinator.selection import TopK
from testbed.errors import PlanError
from testbed.evaluation.items import ChoiceItem, DomainText, EachAlone, choose, losses, read_items
from testbed.experiment.plan import Cell, Choice, Generate, Perplexity, Workload
from testbed.experiment.recorder import Recorder
from testbed.experiment.site import Site

_WARM_UP_PROMPT = "Say hello."


def warm_up(site: Site, tokens: int, recorder: Recorder) -> None:
    """Generate a few tokens that results leave out: caches fill, estimates of the links settle."""
    if tokens:
        _answer(site, -1, -1, _WARM_UP_PROMPT, SamplingConfig(max_tokens=tokens), None, recorder)


def run_workload(site: Site, workload: Workload, cell: Cell, recorder: Recorder) -> None:
    """Run it all.

    Raises:
        WdmoeError: from the model or the data.
    """
    if isinstance(workload, Generate):
        # What one arm has learnt of its steps must not help the next.
        speculation = site.station.speculation.restarted(workload.draft) if site.station else None
        for answer, (number, prompt) in enumerate(workload.prompts_of(cell.repetition)):
            config = SamplingConfig(
                max_tokens=workload.max_tokens,
                temperature=workload.temperature,
                top_p=workload.top_p,
                seed=workload.seed + cell.repetition,
            )
            _answer(site, answer, number, prompt, config, speculation, recorder)
    elif isinstance(workload, Choice):
        _choose(site, workload, recorder)
    else:
        _read(site, workload, recorder)


def _answer(
    site: Site, answer: int, number: int, prompt: str, config: SamplingConfig, speculation: Speculation | None,
    recorder: Recorder,
) -> None:  # fmt: skip
    tokenizer = site.tokenizer
    if tokenizer.has_chat_template:
        ids = tokenizer.encode_chat([{"role": "user", "content": prompt}])
    else:
        ids = tokenizer.encode(prompt)
    new: list[int] = []
    texts: list[str] = []
    first_ns, stop = 0, None
    began_ns = time.perf_counter_ns()
    for event in Sequence(site.model, tokenizer, speculation=speculation).generate(ids, config):
        first_ns = first_ns or time.perf_counter_ns() - began_ns
        recorder.token(answer, len(new), event.steps, id=event.id, warm_up=answer < 0)
        new.append(event.id)
        texts.append(event.text)
        stop = event.stop
    wall_ns = time.perf_counter_ns() - began_ns
    recorder.add(
        "answers",
        (
            *(answer, number, answer < 0, len(ids), len(new), first_ns, wall_ns, stop),
            *(token_sha256(new), "".join(texts)),
        ),
    )


def token_sha256(ids: list[int]) -> str:
    """Equal for equal answers, token by token."""
    return hashlib.sha256(np.asarray(ids, "<i4").tobytes()).hexdigest()


def _choose(site: Site, workload: Choice, recorder: Recorder) -> None:
    first, end = workload.span
    items = read_items(Path(workload.dataset), ChoiceItem, end)[first:]
    if len(items) < end - first:
        raise PlanError(f"{workload.dataset} has {first + len(items)} items, workload '{workload.name}' wants {end}")
    policy = site.model.policy
    blind = site.local is not None and isinstance(policy, TopK)
    known = workload.name, policy
    chosen = site.chosen.get(known, []) if blind else []
    if workload.choosing == "alone" and not blind:
        site.model.policy = EachAlone(policy)  # the next cell sets its own
    for start in range(len(chosen), len(items), workload.batch):
        with _steps(site, recorder, start // workload.batch):
            chosen += choose(site.model, site.tokenizer, items[start : start + workload.batch], batch=workload.batch)
    for i, (choice, item) in enumerate(zip(chosen, items, strict=True), first):
        recorder.add("choices", (i, choice, item.label, choice == item.label))
    if blind:
        site.chosen[known] = chosen


def _read(site: Site, workload: Perplexity, recorder: Recorder) -> None:
    if workload.dataset is None:
        assert isinstance(workload.texts, tuple)  # noqa: S101 (checked with the plan)
        texts = [DomainText("plan", text) for text in workload.texts]
    else:
        by_domain: dict[str, list[DomainText]] = defaultdict(list)
        for text in read_items(Path(workload.dataset), DomainText):
            if isinstance(workload.texts, int) and len(by_domain[text.domain]) < workload.texts:
                by_domain[text.domain].append(text)
        texts = [text for _, some in sorted(by_domain.items()) for text in some]
    for i, text in enumerate(texts):
        with _steps(site, recorder, i):
            ((loss, tokens),) = losses(site.model, site.tokenizer, [text.text], tokens=workload.tokens)
        recorder.add("losses", (i, text.domain, loss, tokens))


@contextmanager
def _steps(site: Site, recorder: Recorder, answer: int) -> Iterator[None]:
    """Meanwhile the model's steps are recorded as the tokens of one answer."""
    numbers = itertools.count()
    site.model.observe = lambda record: recorder.token(answer, next(numbers), (record,))
    try:
        yield
    finally:
        site.model.observe = lambda record: None
