"""Many answers at once: every step carries the tokens of all live sequences, with one dispatch per layer for all."""

import itertools
import logging
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.engine.sequence import PREFILL_CHUNK_TOKENS, GeneratedAnswer, TokenEvent
from bs_coordinator.engine.step_records import StepRecord
from bs_coordinator.errors import AnswerError
from bs_coordinator.trunk.inputs import SequenceInput
from common.errors import WdmoeError, one_line

log = logging.getLogger(__name__)


class Progress(NamedTuple):
    """What a step did for one answer: new tokens, or the error that ended it.

    Attributes:
        step: the step's record, the same object for all answers in the step; None if the answer failed.
    """

    answer: GeneratedAnswer
    events: list[TokenEvent]
    error: WdmoeError | None = None
    step: StepRecord | None = None


class Scheduler:
    """Steps answers until they are done, in the order in which they were added.

    A step has one policy, so answers with different ones take turns.

    Attributes:
        max_live: answers that are stepped at once; others wait.
        prefill_tokens: prompt tokens in one step at most, which bounds how long decoding answers wait for a step.
    """

    def __init__(
        self, model: DistributedModel, *, max_live: int = 16, prefill_tokens: int = PREFILL_CHUNK_TOKENS
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
        self._turns: list[int] = []
        """Ids of the live answers' policies, the one whose step is longest ago first."""

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

        If the step fails, with whatever error, each of its answers is stepped alone, and only those that fail alone end
        with the error. An answer for which a library fails before or after the step ends by itself.
        """
        progress: list[Progress] = []
        chosen = self._select(progress)
        progress += self._run(chosen) if chosen else []
        self._retire(progress)
        return progress

    def _select(self, failed: list[Progress]) -> list[tuple[GeneratedAnswer, SequenceInput]]:
        """Admit waiting answers, then choose the answers of this step and what each of them runs.

        Args:
            failed: those that have no next input because of an error are added here.
        """
        while self._waiting and len(self._live) < self.max_live:
            self._live.append(self._waiting.popleft())
        live = self._next_group()
        # Decoding answers come first: neighbours with few tokens share one pass through the trunk.
        decoding = [answer for answer in live if answer.decoding]
        chosen = []
        budget = self.prefill_tokens
        for answer in [*decoding, *(answer for answer in live if not answer.decoding)]:
            if not answer.decoding and budget <= 0:
                break
            try:
                if answer.decoding:
                    inputs = answer.next_input(sequences=len(decoding))
                else:
                    inputs = answer.next_input(prefill_tokens=budget)
                    budget -= len(inputs.ids)
            except Exception as error:  # noqa: BLE001 - libraries raise anything
                failed.append(Progress(answer, [], _as_answer_error(error)))
                continue
            chosen.append((answer, inputs))
        return chosen

    def _next_group(self) -> list[GeneratedAnswer]:
        """The live answers of the policy whose turn it is."""
        policies = dict.fromkeys(id(answer.policy) for answer in self._live)
        self._turns = [policy for policy in self._turns if policy in policies]
        self._turns += [policy for policy in policies if policy not in self._turns]
        if not self._turns:
            return []
        turn = self._turns.pop(0)
        self._turns.append(turn)
        return [answer for answer in self._live if id(answer.policy) == turn]

    def _step(
        self, inputs: Sequence[SequenceInput], answers: Sequence[GeneratedAnswer]
    ) -> tuple[list[Tensor], StepRecord]:
        own = self._model.policy
        self._model.policy = answers[0].policy or own
        try:
            return self._model.step(inputs, waits=answers[0].ahead if len(answers) == 1 else None)
        finally:
            self._model.policy = own

    def _run(self, chosen: Sequence[tuple[GeneratedAnswer, SequenceInput]]) -> list[Progress]:
        """Step the chosen answers together, or each alone if that fails."""
        answers = [answer for answer, _ in chosen]
        try:
            logits, record = self._step([inputs for _, inputs in chosen], answers)
        except Exception as error:  # noqa: BLE001 - libraries raise anything
            if len(answers) == 1:
                return [Progress(answers[0], [], _as_answer_error(error))]
            return [self._run_alone(answer) for answer in answers]
        first_rows = itertools.accumulate((len(inputs.ids) for _, inputs in chosen), initial=0)
        progress = [
            _accept(answer, some, record, sequences=len(answers), first_row=first_row)
            for answer, some, first_row in zip(answers, logits, first_rows, strict=False)
        ]
        if answers[0].policy is None:  # drafts are for the model's own policy
            tokens = sum(len(p.events) for p in progress)
            answers[0].speculation.observe(record, sequences=len(answers), tokens=tokens)
        return progress

    def _run_alone(self, answer: GeneratedAnswer) -> Progress:
        try:
            (logits,), record = self._step([answer.next_input(prefill_tokens=self.prefill_tokens)], [answer])
        except Exception as error:  # noqa: BLE001 - libraries raise anything
            return Progress(answer, [], _as_answer_error(error))
        return _accept(answer, logits, record, sequences=1)

    def _retire(self, progress: Sequence[Progress]) -> None:
        """Remove the answers that are done or have failed."""
        over = [p.answer for p in progress if p.error or p.answer.done]
        self._live = [answer for answer in self._live if answer not in over]


def _accept(
    answer: GeneratedAnswer, logits: Tensor, record: StepRecord, *, sequences: int, first_row: int = 0
) -> Progress:
    try:
        events = answer.accept(logits, record, sequences=sequences, first_row=first_row)
        return Progress(answer, events, step=record)
    except Exception as error:  # noqa: BLE001 - libraries raise anything
        return Progress(answer, [], _as_answer_error(error))


def _as_answer_error(error: Exception) -> WdmoeError:
    """Our own errors as they are; errors of libraries as the end of the answer that they were raised for."""
    if isinstance(error, WdmoeError):
        return error
    log.debug("an answer failed", exc_info=error)
    return AnswerError(f"this answer failed: {type(error).__name__}: {one_line(error)}")
