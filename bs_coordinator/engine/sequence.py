"""Token sequences as state machines: what to run next, and what its logits mean. No waiting, no experts."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from bs_coordinator.config import SamplingConfig
from bs_coordinator.engine.model import DistributedMixtral
from bs_coordinator.engine.sampling import Sampler
from bs_coordinator.engine.speculation import Draft, DraftLength, Speculation
from bs_coordinator.engine.speculation.drafts import DraftToken
from bs_coordinator.engine.step_records import StepRecord
from bs_coordinator.engine.tokenizer import ChatMessage, TextStream, Tokenizer
from bs_coordinator.errors import ContextLengthError
from bs_coordinator.trunk.inputs import SequenceInput

__all__ = ["Answer", "ChatMessage", "Sequence", "StopReason", "TextStream", "TokenEvent", "Tokenizer"]

PREFILL_CHUNK_TOKENS = 512
"""A long prompt goes through the model in pieces of this size, so that activations stay small."""

StopReason = Literal["eos", "max-tokens", "context"]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One new token.

    Attributes:
        text: what it adds to the text.
        steps: the forward steps that it took: one, one per piece of the prompt, or none for a token that came with
            the one before it, as its accepted draft.
        stop: why the sequence ends here, else None. An end-of-sequence token has no text.
    """

    id: int
    text: str
    steps: tuple[StepRecord, ...]
    stop: StopReason | None


class Sequence:
    """One growing token sequence and its KV cache; prompts that continue it are not computed again."""

    def __init__(
        self,
        model: DistributedMixtral,
        tokenizer: Tokenizer,
        *,
        speculation: Speculation | None = None,
    ) -> None:
        """An empty sequence.

        Args:
            speculation: how all sequences of this model draft; None for plain decoding.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.speculation = speculation or Speculation()
        self.drafter = self.speculation.drafter()
        self.cache = model.trunk.new_cache()
        self.cached_ids: list[int] = []
        self.max_positions: int = model.trunk.config.max_position_embeddings

    def answer(self, prompt: list[int], config: SamplingConfig) -> "Answer":
        """Begin to continue `prompt`; one answer of a sequence at a time.

        Raises:
            ContextLengthError: the prompt leaves no room in the model's context.
            ValueError: the prompt is empty.
        """
        if not prompt:
            raise ValueError("the prompt is empty")
        if len(prompt) >= self.max_positions:
            raise ContextLengthError(
                f"the prompt has {len(prompt)} tokens, the model's context is {self.max_positions}: shorten it"
            )
        return Answer(self, prompt, config)

    def generate(self, prompt: list[int], config: SamplingConfig) -> Iterator[TokenEvent]:
        """Continue `prompt` token by token; the caller may stop at any token.

        Raises:
            ContextLengthError, ValueError: as `answer`.
            WdmoeError: from the experts.
        """
        return self._generate(self.answer(prompt, config))

    def _generate(self, answer: "Answer") -> Iterator[TokenEvent]:
        while not answer.done:
            (logits,), step = self.model.step([answer.next_feed()])
            events = answer.accept(logits, step)
            self.speculation.observe(step, sequences=1, tokens=len(events))
            yield from events

    def reuse_cache(self, prompt: list[int]) -> list[int]:
        """Cut the cache to what it shares with `prompt`; the ids still to run, at least one."""
        shared = 0
        limit = min(len(self.cached_ids), len(prompt) - 1)
        while shared < limit and self.cached_ids[shared] == prompt[shared]:
            shared += 1
        self.truncate(shared)
        return prompt[shared:]

    def truncate(self, tokens: int) -> None:
        """Forget all but the first `tokens` positions."""
        if tokens < len(self.cached_ids):
            self.model.trunk.truncate(self.cache, tokens)
            del self.cached_ids[tokens:]


class Answer:
    """One answer of a sequence while it is made.

    Attributes:
        done: whether its last token has come.
    """

    def __init__(self, sequence: Sequence, prompt: list[int], config: SamplingConfig) -> None:
        self.done = False
        self._sequence = sequence
        self._ids = list(prompt)
        self._prompt_tokens = len(prompt)
        self._config = config
        self._sampler = Sampler(config)
        self._stream = sequence.tokenizer.stream()
        self._pending = sequence.reuse_cache(prompt)
        self._fed: list[int] = []
        self._length = DraftLength(sequence.speculation.cost, sequence.speculation.acceptance)
        self._draft = Draft()
        self._steps: list[StepRecord] = []

    @property
    def decoding(self) -> bool:
        """Whether the prompt has been run."""
        return len(self._ids) > self._prompt_tokens

    @property
    def speculation(self) -> Speculation:
        """How its sequence drafts."""
        return self._sequence.speculation

    def next_feed(self, *, prefill_tokens: int = PREFILL_CHUNK_TOKENS, sequences: int = 1) -> SequenceInput:
        """What to run next: a piece of the prompt, or the last token and guesses of those after it.

        Args:
            prefill_tokens: of the prompt at most.
            sequences: that will share the step.
        """
        self._fed = self._pending[:prefill_tokens]
        self._draft = Draft()
        drafter = self._sequence.drafter
        if not self.decoding and drafter is not None and len(self._fed) == len(self._pending) and sequences == 1:
            # Drafts of one among many are short, if there are any.
            drafter.prepare(self._ids)
        if self.decoding and drafter is not None:
            # The last token that may be generated needs no guess after it.
            generated = len(self._ids) - self._prompt_tokens
            room = min(self._config.max_tokens - generated - 1, self._sequence.max_positions - len(self._ids) - 1)
            guesses = _to_the_end(drafter.guesses(self._ids), self._sequence.tokenizer.eos_id)
            self._draft = self._length.draft(guesses, room, sequences=sequences)
        drafted = [guess.id for guess in self._draft.guesses]
        rows = list(range(len(drafted) + 1)) if drafted else None
        return SequenceInput(self._fed + drafted, self._sequence.cache, rows=rows)

    def accept(self, logits: Tensor, step: StepRecord, *, sequences: int = 1) -> list[TokenEvent]:
        """Take in what became of the last feed: the new tokens, none while the prompt is not through.

        Args:
            sequences: that shared the step.
        """
        sequence, draft = self._sequence, self._draft
        drafted = [guess.id for guess in draft.guesses]
        sequence.cached_ids += self._fed + drafted
        self._pending = self._pending[len(self._fed) :]
        if self._pending:
            self._steps.append(step)
            return []
        chosen = self._sampler.verify(logits, drafted) if drafted else [self._sampler.choose(logits)]
        accepted = len(chosen) - 1
        if self.decoding:
            self._length.observe(draft, accepted, step.total_ns / 1e9, rows=step.tokens, sequences=sequences)
        if draft.guesses or draft.seconds:
            draft_ns = int(1e9 * draft.seconds)
            step = replace(step, drafted=len(drafted), accepted=accepted, draft_ns=draft_ns)
        self._steps.append(step)
        events = []
        for id in chosen:
            stop = self._stop(id)
            text = "" if stop == "eos" else self._stream.push(id)
            self._ids.append(id)
            events.append(TokenEvent(id, text, tuple(self._steps), stop))
            self._steps = []
            if stop:
                self.done = True
                break
        # The last token has not been run; guesses that were refused should not have been.
        sequence.truncate(len(self._ids) - 1)
        self._pending = self._ids[-1:]
        return events

    def _stop(self, id: int) -> StopReason | None:
        if id == self._sequence.tokenizer.eos_id:
            return "eos"
        if len(self._ids) + 1 >= self._sequence.max_positions:
            return "context"
        return "max-tokens" if len(self._ids) + 1 - self._prompt_tokens == self._config.max_tokens else None


def _to_the_end(guesses: Iterator[DraftToken], eos_id: int | None) -> Iterator[DraftToken]:
    """Guesses up to the end of the answer: what follows it would be thrown away."""
    for guess in guesses:
        yield guess
        if guess.id == eos_id:
            return
