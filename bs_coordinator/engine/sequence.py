"""Token sequences as state machines: what to run next, and what its logits mean. No waiting, no experts."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from bs_coordinator.config import SamplingConfig
from bs_coordinator.engine.logprobs import TokenLogprob, log_probabilities
from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.engine.sampling import TokenSampler
from bs_coordinator.engine.speculation import Draft, Drafter, DraftLength, Proposals, Speculation
from bs_coordinator.engine.speculation.drafts import Ahead
from bs_coordinator.engine.step_records import StepRecord
from bs_coordinator.engine.tokenizer import Tokenizer
from bs_coordinator.errors import ContextLengthError
from bs_coordinator.selection import Policy
from bs_coordinator.trunk.inputs import SequenceInput
from bs_coordinator.trunk.kv_cache import keep_branch

PREFILL_CHUNK_TOKENS = 512
"""Longer prompts go through the model in chunks of this size, which keeps activations small."""

_SCORED_CHUNK_TOKENS = 128
"""Of prompts whose tokens are all scored: the logits of 512 tokens with 152,000 entries each would take 300 MB."""

StopReason = Literal["eos", "max-tokens", "context"]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One new token.

    Attributes:
        id: of the token.
        text: what the token adds to the text; empty for an end-of-sequence token.
        steps: the forward steps it took: one, one per chunk of the prompt, or none for an accepted draft token, which
            came with the token before it.
        stop: why the sequence ends here, else None.
        logprob: of the token, if `SamplingConfig.logprobs` asks for it.
        prompt: with the first token, the log-probabilities of all tokens of the prompt but the first, if
            `SamplingConfig.prompt_logprobs` asks for them.
        degraded: some layer lacked a preferred expert for the token before it, of which it was computed; for the first
            token, for a token of the prompt.
    """

    id: int
    text: str
    steps: tuple[StepRecord, ...]
    stop: StopReason | None
    logprob: TokenLogprob | None = None
    prompt: tuple[TokenLogprob, ...] = ()
    degraded: bool = False


class Sequence:
    """One growing token sequence and its KV cache. Prompts that continue it are not computed again.

    Attributes:
        model: that runs the sequence.
        tokenizer: of the model.
        speculation: what all sequences of the model share when they draft.
        drafter: of this sequence; None for plain decoding.
        cache: the KV cache.
        cached_ids: token ids that the cache holds.
        max_positions: the model's context length.
    """

    def __init__(
        self,
        model: DistributedModel,
        tokenizer: Tokenizer,
        *,
        speculation: Speculation | None = None,
    ) -> None:
        """An empty sequence.

        Args:
            model: that runs the sequence.
            tokenizer: of the model.
            speculation: how all sequences of this model draft; None for plain decoding.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.speculation = speculation or Speculation()
        # Where nothing can be removed from a cache, neither can draft tokens that turn out to be wrong.
        self.drafter = self.speculation.drafter() if model.trunk.can_truncate else None
        self.cache = model.trunk.new_cache()
        self.cached_ids: list[int] = []
        self.max_positions: int = model.trunk.max_positions

    def answer(
        self, prompt: list[int], config: SamplingConfig, *, same_text: bool = False, policy: Policy | None = None
    ) -> "GeneratedAnswer":  # fmt: skip
        """Begin to continue `prompt`. A sequence may have only one answer at a time.

        Args:
            prompt: token ids.
            config: of the sampling.
            same_text: the answer continues the prompt's text, whose next character may be a space, instead of
                beginning a text of its own, as in a chat.
            policy: as `GeneratedAnswer.policy`.

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
        return GeneratedAnswer(self, prompt, config, same_text=same_text, policy=policy)

    def generate(self, prompt: list[int], config: SamplingConfig, *, same_text: bool = False) -> Iterator[TokenEvent]:
        """Continue `prompt` token by token; the caller may stop at any token.

        Args:
            prompt: token ids.
            config: of the sampling.
            same_text: the answer continues the prompt's text, as for `answer`.

        Raises:
            ContextLengthError: the prompt leaves no room in the model's context.
            ValueError: the prompt is empty.
            WdmoeError: an expert is unavailable or failed.
        """
        return self._generate(self.answer(prompt, config, same_text=same_text))

    def _generate(self, answer: "GeneratedAnswer") -> Iterator[TokenEvent]:
        while not answer.done:
            inputs = answer.next_input()
            (logits,), step = self.model.step([inputs], waits=answer.ahead)
            events = answer.accept(logits, step)
            self.speculation.observe(step, sequences=1, tokens=len(events))
            yield from events

    def reuse_cache(self, prompt: list[int]) -> list[int]:
        """Cut the cache to the prefix it shares with `prompt`; returns the ids still to run, at least one."""
        shared = 0
        trunk = self.model.trunk
        # What was computed in a shorter sequence is of no use where tokens depend on the sequence's length.
        limit = 0 if trunk.rope_by_length else min(len(self.cached_ids), len(prompt) - 1)
        while shared < limit and self.cached_ids[shared] == prompt[shared]:
            shared += 1
        kept_whole = shared == len(self.cached_ids) and (trunk.continues or len(prompt) - shared == 1)
        if not trunk.can_truncate and not kept_whole:
            self.forget()
            return prompt
        self.truncate(shared)
        return prompt[shared:]

    def fork(self) -> "Sequence":
        """A sequence of its own with a copy of what this one has cached, for other continuations of its beginning.

        It is empty if a cache can't be cut to the common beginning, or is of no use at another length.
        """
        fork = Sequence(self.model, self.tokenizer, speculation=self.speculation)
        if self.model.trunk.can_truncate and not self.model.trunk.rope_by_length:
            fork.cache, fork.cached_ids = copy.deepcopy(self.cache), list(self.cached_ids)
        return fork

    def forget(self) -> None:
        """Empty the cache."""
        self.cache, self.cached_ids = self.model.trunk.new_cache(), []

    def truncate(self, tokens: int) -> None:
        """Remove all but the first `tokens` positions from the cache."""
        if tokens < len(self.cached_ids):
            self.model.trunk.truncate(self.cache, tokens)
            del self.cached_ids[tokens:]


class GeneratedAnswer:
    """One answer of a sequence while it is generated.

    Attributes:
        done: whether the last token has been generated.
        prompt_tokens: length of the prompt.
        policy: by which `Scheduler` has the experts of its tokens chosen; None for the model's own policy.
        ahead: prepares drafts while the last input is run; None if that does not pay.
    """

    def __init__(
        self, sequence: Sequence, prompt: list[int], config: SamplingConfig, *, same_text: bool,
        policy: Policy | None = None,
    ) -> None:  # fmt: skip
        self.done = False
        self.policy = policy
        self.ahead: Ahead | None = None
        self._sequence = sequence
        self._ids = list(prompt)
        self.prompt_tokens = len(prompt)
        self._config = config
        self._sampler = TokenSampler(config)
        self._stream = sequence.tokenizer.stream(prompt if same_text else ())
        if config.prompt_logprobs:
            sequence.forget()
        self._pending = sequence.reuse_cache(prompt)
        self._prompt_logprobs: list[TokenLogprob] = []
        self._running: list[int] = []
        self._length = DraftLength(sequence.speculation.cost, sequence.speculation.acceptance)
        self._draft = Draft()
        self._steps: list[StepRecord] = []
        self._prompt_degraded = False

    @property
    def decoding(self) -> bool:
        """Whether the prompt has been run."""
        return len(self._ids) > self.prompt_tokens

    @property
    def speculation(self) -> Speculation:
        """How the sequence drafts."""
        return self._sequence.speculation

    def next_input(self, *, prefill_tokens: int = PREFILL_CHUNK_TOKENS, sequences: int = 1) -> SequenceInput:
        """What to run next: a chunk of the prompt, or the last token and draft tokens that may follow it.

        Args:
            prefill_tokens: prompt tokens at most.
            sequences: number of sequences that will share the step.
        """
        trunk = self._sequence.model.trunk
        scored = self._config.prompt_logprobs and not self.decoding
        if scored:
            prefill_tokens = min(prefill_tokens, _SCORED_CHUNK_TOKENS)
        self._running = self._pending[:prefill_tokens] if trunk.continues else self._pending
        self._draft, self.ahead = Draft(), None
        drafter = self._sequence.drafter
        # With several sequences in a step drafts are short or empty: not worth reading a prompt ahead of time.
        prompt_ends = len(self._running) == len(self._pending)
        if drafter is not None and not self.decoding and prompt_ends and sequences == 1:
            drafter.prepare(self._ids)
        if drafter is not None and self.decoding:
            # One token less than may still be generated: the step itself yields one more than its draft.
            generated = len(self._ids) - self.prompt_tokens
            room = min(self._config.max_tokens - generated - 1, self._sequence.max_positions - len(self._ids) - 1)
            branching = self.speculation.branching and trunk.batch_invariant
            self._draft = self._length.draft(self._proposals(drafter), room, sequences=sequences, branching=branching)
            spare, share = self.speculation.spare, self.speculation.acceptance.share
            if spare is not None and sequences == 1 and spare.uses_next():
                self.ahead = drafter.read_ahead(self._ids, self._draft, share, spare)
        drafted = self._draft.ids
        count = len(self._running) if scored else len(drafted) + 1 if drafted else 0
        return SequenceInput(
            self._running + drafted, self._sequence.cache, rows=list(range(count)) or None, length=len(self._ids),
            prompt=scored, parents=self._draft.parents,
        )  # fmt: skip

    def accept(
        self, logits: Tensor, step: StepRecord, *, sequences: int = 1, first_row: int = 0
    ) -> list[TokenEvent]:  # fmt: skip
        """Take in the result of the last input; returns the new tokens, none while the prompt is not finished.

        Args:
            logits: of the last input, as `DistributedModel.step` returns them.
            step: its record.
            sequences: number of sequences that shared the step.
            first_row: of the last input among all tokens of the step.
        """
        sequence, draft = self._sequence, self._draft
        drafted = draft.ids
        past = len(sequence.cached_ids)
        degraded = {row - first_row for row in step.degraded}.intersection(range(len(self._running) + len(drafted)))
        if not self.decoding:
            self._prompt_degraded |= bool(degraded)
        sequence.cached_ids += self._running + drafted
        self._pending = self._pending[len(self._running) :]
        if self._config.prompt_logprobs and not self.decoding:
            logits = self._score_prompt(logits)
        if self._pending:
            self._steps.append(step)
            return []
        choices = self._without_eos(logits)
        rows = draft.rows
        chosen = self._sampler.verify(choices, rows) if drafted else [self._sampler.choose(choices)]
        accepted = len(chosen) - 1
        kept = [rows[tuple(chosen[:i])] for i in range(len(chosen))]
        if kept != list(range(len(chosen))):
            logits = logits[kept]
            keep_branch(sequence.cache, past, kept)
            sequence.cached_ids[past:] = [*self._running, *chosen[:accepted]]
        top = self._config.logprobs
        scores = [None] * len(chosen) if top is None else log_probabilities(logits, chosen, top)
        lacking = [row in degraded for row in kept] if self.decoding else [self._prompt_degraded]
        if self.decoding:
            if self.speculation.spare is not None and drafted and sequences == 1:
                reads = self.ahead.reads if self.ahead else 0
                expected_s = self.speculation.cost.seconds(step.tokens)
                self.speculation.spare.observe_step(step.total_ns / 1e9, expected_s, reads)
            self._length.observe(draft, chosen, step.total_ns / 1e9, rows=step.tokens, sequences=sequences)
        if drafted or draft.seconds:
            draft_ns = int(1e9 * draft.seconds)
            step = replace(step, drafted=len(drafted), accepted=accepted, draft_ns=draft_ns)
        self._steps.append(step)
        events = []
        for id, score, lacks in zip(chosen, scores, lacking, strict=True):
            stop = self._stop_reason(id)
            text = "" if stop == "eos" else self._stream.push(id)
            self._ids.append(id)
            events.append(TokenEvent(id, text, tuple(self._steps), stop, score, tuple(self._prompt_logprobs), lacks))
            self._steps, self._prompt_logprobs = [], []
            if stop:
                self.done = True
                break
        # The last token has not been run yet, and rejected draft tokens must not stay in the cache.
        sequence.truncate(len(self._ids) - 1)
        self._pending = self._ids[-1:]
        return events

    def _proposals(self, drafter: Drafter) -> Proposals:
        """What the drafter proposes after the text so far; nothing after the end of the sequence."""
        eos_ids = self._sequence.tokenizer.eos_ids
        return Proposals(
            lambda path: () if path and path[-1] in eos_ids else drafter.known(self._ids, path),
            lambda path: drafter.find(self._ids, path),
        )

    def _score_prompt(self, logits: Tensor) -> Tensor:
        """Keep the log-probabilities of the prompt's tokens that follow the ones just run; returns the last row."""
        done = len(self._sequence.cached_ids)
        following = self._ids[done - len(logits) + 1 : done + 1]
        self._prompt_logprobs += log_probabilities(logits, following, self._config.logprobs or 0)
        return logits[-1:]

    def _without_eos(self, logits: Tensor) -> Tensor:
        """The logits with end tokens made impossible in the rows before `min_tokens`; row 0 is the next token's."""
        least = self._config.min_tokens - (len(self._ids) - self.prompt_tokens)
        if least <= 0:
            return logits
        logits = logits.clone()
        rows = torch.tensor([[row] for branch, row in self._draft.rows.items() if len(branch) < least])
        logits[rows, list(self._sequence.tokenizer.eos_ids)] = -torch.inf
        return logits

    def _stop_reason(self, id: int) -> StopReason | None:
        if id in self._sequence.tokenizer.eos_ids and not self._config.ignore_eos:
            return "eos"
        if len(self._ids) + 1 >= self._sequence.max_positions:
            return "context"
        return "max-tokens" if len(self._ids) + 1 - self.prompt_tokens == self._config.max_tokens else None
