"""Several sequences per step compared with one, on an emulated network: 8 nodes, 5 ms round trips."""

import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator

from bs_coordinator.base_station import BaseStation
from bs_coordinator.config import SamplingConfig
from bs_coordinator.engine.scheduler import Scheduler
from bs_coordinator.engine.sequence import GeneratedAnswer, Sequence
from bs_coordinator.engine.step_records import StepRecord
from testbed.bench.chat_prompts import CHAT_PROMPTS
from testbed.bench.rows import Result, Row, Settings, Skipped
from testbed.bench.sections.speculation import EIGHT, RTT_MS, open_site
from testbed.bench.system import why_not

_COUNTS = (1, 2, 4, 8, 16)
_STEPS = 12
_ROUNDS = 3


def measure(settings: Settings) -> Iterator[Result]:
    """Yield a row per number of sequences; a sample is the time of one step per token."""
    if why := why_not():
        yield Skipped(f"concurrent sequences, {RTT_MS:g} ms", why)
        return
    with open_site(settings, EIGHT) as station:
        batches = [_Batch(station, count) for count in _COUNTS]
        for _ in range(_ROUNDS):
            for batch in batches:
                batch.run()
        alone = batches[0]
        for batch in batches:
            count = batch.count
            parameters = {"sequences": count, "rtt_ms": RTT_MS, "steps": _STEPS, "rounds": _ROUNDS}
            parameters["tokens_per_s"] = 1e3 / statistics.median(batch.token_ms)
            yield Row(
                f"{count} concurrent sequences, ms per token, {RTT_MS:g} ms", "one sequence", batch.token_ms,
                alone.token_ms, 0.25 if count == 8 else None, parameters, batch.parts(),
            )  # fmt: skip


class _Batch:
    """Keeps `count` answers running; when one ends, the next begins.

    Attributes:
        count: number of answers.
        token_ms: time of each step in which every answer got a token, divided by `count`.
    """

    def __init__(self, station: BaseStation, count: int) -> None:
        self.count = count
        self.token_ms: list[float] = []
        self._station = station
        self._steps: list[StepRecord] = []
        self._scheduler = Scheduler(station.model, max_live=count)
        self._prompts = itertools.cycle(CHAT_PROMPTS)
        self._answers = [self._next() for _ in range(count)]

    def run(self) -> None:
        """Measure some steps in which all answers decode; steps that read prompts of new answers are not measured."""
        for _ in range(_STEPS):
            self._answers = [self._next() if answer.done else answer for answer in self._answers]
            while not all(answer.decoding for answer in self._answers):
                self._scheduler.step()
                self._answers = [self._next() if answer.done else answer for answer in self._answers]
            began = time.perf_counter_ns()
            progress = self._scheduler.step()
            self.token_ms.append((time.perf_counter_ns() - began) / 1e6 / self.count)
            self._steps += progress[0].events[0].steps

    def _next(self) -> GeneratedAnswer:
        ids = self._station.tokenizer.encode_chat([{"role": "user", "content": next(self._prompts)}])
        answer = Sequence(self._station.model, self._station.tokenizer).answer(ids, SamplingConfig())
        self._scheduler.add(answer)
        return answer

    def parts(self) -> dict[str, float]:
        """Median time of each part of a step in ms, not divided by the number of tokens."""
        parts: dict[str, list[float]] = defaultdict(list)
        for step in self._steps:
            split = step.split_ns()
            for part in ("trunk", "network", "compute", "wait", "framing"):
                parts[part].append(getattr(split, part) / 1e6)
        return {part: statistics.median(values) for part, values in parts.items()}
