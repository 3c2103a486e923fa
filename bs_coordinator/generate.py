"""Token sequences as state machines: what to run next, and what its logits mean. No waiting, no experts."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from bs_coordinator.model import DistributedMixtral, Feed
from bs_coordinator.records import StepRecord
from bs_coordinator.sampling import Sampler, SamplingConfig
from bs_coordinator.speculation import Drafter, DraftLength, NoDrafter, StepCost
from bs_coordinator.tokenizer import ChatMessage, TextStream, Tokenizer
from wire.errors import ContextLengthError

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
        drafter: Drafter | None = None,
        cost: StepCost | None = None,
    ) -> None:
        """An empty sequence.

        Args:
            drafter: guesses what comes next; None for plain decoding.
            cost: what steps of this model cost, learnt by all sequences together.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.drafter = drafter or NoDrafter()
        self.drafts = drafter is not None
        self.cost = cost or StepCost()
        self.length = DraftLength(self.cost)
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
            yield from answer.accept(logits, step)

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
        self._draft: list[int] = []
        self._draft_s = 0.0
        self._steps: list[StepRecord] = []

    @property
    def decoding(self) -> bool:
        """Whether the prompt has been run."""
        return len(self._ids) > self._prompt_tokens

    def next_feed(self, *, prefill_tokens: int = PREFILL_CHUNK_TOKENS) -> Feed:
        """What to run next: a piece of the prompt, or the last token and drafts of those after it.

        Args:
            prefill_tokens: of the prompt at most.
        """
        self._fed = self._pending[:prefill_tokens]
        self._draft = []
        if self.decoding and self._sequence.drafts:
            # The last token that may be generated needs no draft after it.
            generated = len(self._ids) - self._prompt_tokens
            room = min(
                self._config.max_tokens - generated - 1,
                self._sequence.max_positions - len(self._ids) - 1,
                self._sequence.length.choose(),
            )
            began = time.perf_counter()
            self._draft = self._sequence.drafter.draft(self._ids, room) if room > 0 else []
            self._draft_s = time.perf_counter() - began
        rows = list(range(len(self._draft) + 1)) if self._draft else None
        return Feed(self._fed + self._draft, self._sequence.cache, rows=rows)

    def accept(self, logits: Tensor, step: StepRecord, *, alone: bool = True) -> list[TokenEvent]:
        """Take in what became of the last feed: the new tokens, none while the prompt is not through.

        Args:
            alone: no other sequence shared the step, so that its time is this feed's.
        """
        sequence, draft = self._sequence, self._draft
        sequence.cached_ids += self._fed + draft
        self._steps.append(step)
        self._pending = self._pending[len(self._fed) :]
        if self._pending:
            return []
        if self.decoding and alone:
            sequence.cost.observe(1 + len(draft), step.total_ns / 1e9)
        chosen = self._sampler.verify(logits, draft) if draft else [self._sampler.choose(logits)]
        sequence.length.observe(len(draft), len(chosen) - 1, self._draft_s)
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
        # The last token has not been run; drafts that were refused should not have been.
        sequence.truncate(len(self._ids) - 1)
        self._pending = self._ids[-1:]
        return events

    def _stop(self, id: int) -> StopReason | None:
        if id == self._sequence.tokenizer.eos_id:
            return "eos"
        if len(self._ids) + 1 >= self._sequence.max_positions:
            return "context"
        return "max-tokens" if len(self._ids) + 1 - self._prompt_tokens == self._config.max_tokens else None
