"""Many answers at once: every step carries the tokens of all live sequences, with one dispatch per layer for all."""

from collections import deque
from typing import NamedTuple

from bs_coordinator.engine.model import DistributedMixtral
from bs_coordinator.engine.sequence import PREFILL_CHUNK_TOKENS, Answer, TokenEvent
from common.errors import WdmoeError


class Progress(NamedTuple):
    """What a step did for one answer: new tokens, or the error that ended it."""

    answer: Answer
    events: list[TokenEvent]
    error: WdmoeError | None = None


class Scheduler:
    """Steps answers until they are done; first come, first served.

    Attributes:
        max_live: answers that are stepped at once; others wait.
        prefill_tokens: of prompts in one step, so that those who decode need not wait long.
    """

    def __init__(
        self, model: DistributedMixtral, *, max_live: int = 16, prefill_tokens: int = PREFILL_CHUNK_TOKENS
    ) -> None:
        if max_live < 1 or prefill_tokens < 1:
            raise ValueError("max_live and prefill_tokens must be at least 1")
        self.max_live = max_live
        self.prefill_tokens = prefill_tokens
        self._model = model
        self._waiting: deque[Answer] = deque()
        self._live: list[Answer] = []

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._live and not self._waiting

    def add(self, answer: Answer) -> None:
        """Queue an answer; a sequence may have one at a time."""
        self._waiting.append(answer)

    def cancel(self, answer: Answer) -> None:
        """Forget an answer, if it is not done yet; its sequence keeps what it has cached."""
        self._live = [other for other in self._live if other is not answer]
        self._waiting = deque(other for other in self._waiting if other is not answer)

    def step(self) -> list[Progress]:
        """One step for those who are next; empty when idle.

        An error of the step is looked into by stepping each answer alone: only those that fail alone end with it.
        """
        while self._waiting and len(self._live) < self.max_live:
            self._live.append(self._waiting.popleft())
        # Those who decode come first in the step: their rows go through the trunk together.
        chosen = [answer for answer in self._live if answer.decoding]
        decoding = len(chosen)
        inputs = [answer.next_feed(sequences=decoding) for answer in chosen]
        budget = self.prefill_tokens
        for answer in self._live:
            if not answer.decoding and budget > 0:
                feed = answer.next_feed(prefill_tokens=budget)
                budget -= len(feed.ids)
                chosen.append(answer)
                inputs.append(feed)
        if not chosen:
            return []
        try:
            logits, record = self._model.step(inputs)
        except WdmoeError as error:
            progress = [Progress(chosen[0], [], error)] if len(chosen) == 1 else [self._alone(a) for a in chosen]
        else:
            progress = [
                Progress(answer, answer.accept(some, record, sequences=len(chosen)))
                for answer, some in zip(chosen, logits, strict=True)
            ]
            tokens = sum(len(p.events) for p in progress)
            chosen[0].speculation.observe(record, sequences=len(chosen), tokens=tokens)
        over = [p.answer for p in progress if p.error or p.answer.done]
        self._live = [answer for answer in self._live if answer not in over]
        return progress

    def _alone(self, answer: Answer) -> Progress:
        try:
            (logits,), record = self._model.step([answer.next_feed(prefill_tokens=self.prefill_tokens)])
        except WdmoeError as error:
            return Progress(answer, [], error)
        return Progress(answer, answer.accept(logits, record))
