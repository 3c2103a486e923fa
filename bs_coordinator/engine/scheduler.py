"""Many answers at once: every step carries the tokens of all live sequences, with one dispatch per layer for all."""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from bs_coordinator.engine.model import DistributedMixtral
from bs_coordinator.engine.sequence import PREFILL_CHUNK_TOKENS, GeneratedAnswer, TokenEvent
from bs_coordinator.trunk.inputs import SequenceInput
from common.errors import WdmoeError


class Progress(NamedTuple):
    """What a step did for one answer: new tokens, or the error that ended it."""

    answer: GeneratedAnswer
    events: list[TokenEvent]
    error: WdmoeError | None = None


class Scheduler:
    """Steps answers until they are done, in the order in which they were added.

    Attributes:
        max_live: answers that are stepped at once; others wait.
        prefill_tokens: prompt tokens in one step at most, which bounds how long decoding answers wait for a step.
    """

    def __init__(
        self, model: DistributedMixtral, *, max_live: int = 16, prefill_tokens: int = PREFILL_CHUNK_TOKENS
    ) -> None:
        """An idle scheduler.

        Raises:
            ValueError: a limit is below 1.
        """
        if max_live < 1 or prefill_tokens < 1:
            raise ValueError("max_live and prefill_tokens must be at least 1")
        self.max_live = max_live
        self.prefill_tokens = prefill_tokens
        self._model = model
        self._waiting: deque[GeneratedAnswer] = deque()
        self._live: list[GeneratedAnswer] = []

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._live and not self._waiting

    def add(self, answer: GeneratedAnswer) -> None:
        """Queue an answer. A sequence may have only one at a time."""
        self._waiting.append(answer)

    def cancel(self, answer: GeneratedAnswer) -> None:
        """Drop an answer if it is not done yet; its sequence keeps what it has cached."""
        self._live = [other for other in self._live if other is not answer]
        self._waiting = deque(other for other in self._waiting if other is not answer)

    def step(self) -> list[Progress]:
        """Run one step; returns the progress of the answers in it, empty when idle.

        If the step fails, each of its answers is stepped alone, and only those that fail alone end with the error.
        """
        inputs = self._select()
        progress = self._run(inputs) if inputs else []
        self._retire(progress)
        return progress

    def _select(self) -> list[tuple[GeneratedAnswer, SequenceInput]]:
        """Admit waiting answers, then choose the answers of this step and what each of them runs."""
        while self._waiting and len(self._live) < self.max_live:
            self._live.append(self._waiting.popleft())
        # Decoding answers come first: neighbours with few tokens share one pass through the trunk.
        decoding = [answer for answer in self._live if answer.decoding]
        chosen = [(answer, answer.next_input(sequences=len(decoding))) for answer in decoding]
        budget = self.prefill_tokens
        for answer in self._live:
            if not answer.decoding and budget > 0:
                piece = answer.next_input(prefill_tokens=budget)
                budget -= len(piece.ids)
                chosen.append((answer, piece))
        return chosen

    def _run(self, chosen: Sequence[tuple[GeneratedAnswer, SequenceInput]]) -> list[Progress]:
        """Step the chosen answers together, or each alone if that fails."""
        answers = [answer for answer, _ in chosen]
        try:
            logits, record = self._model.step([piece for _, piece in chosen])
        except WdmoeError as error:
            return [Progress(answers[0], [], error)] if len(answers) == 1 else [self._run_alone(a) for a in answers]
        progress = [
            Progress(answer, answer.accept(some, record, sequences=len(answers)))
            for answer, some in zip(answers, logits, strict=True)
        ]
        tokens = sum(len(p.events) for p in progress)
        answers[0].speculation.observe(record, sequences=len(answers), tokens=tokens)
        return progress

    def _run_alone(self, answer: GeneratedAnswer) -> Progress:
        try:
            (logits,), record = self._model.step([answer.next_input(prefill_tokens=self.prefill_tokens)])
        except WdmoeError as error:
            return Progress(answer, [], error)
        return Progress(answer, answer.accept(logits, record))

    def _retire(self, progress: Sequence[Progress]) -> None:
        """Remove the answers that are done or have failed."""
        over = [p.answer for p in progress if p.error or p.answer.done]
        self._live = [answer for answer in self._live if answer not in over]
