"""Text in, text out: prompts, sequences with their KV cache, streaming."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer

from bs_coordinator.model import DistributedMixtral, Feed
from bs_coordinator.records import StepRecord
from bs_coordinator.sampling import Sampler, SamplingConfig
from wire.errors import BundleError, ContextLengthError

PREFILL_CHUNK_TOKENS = 512
"""A long prompt goes through the model in pieces of this size, so that activations stay small."""

StopReason = Literal["eos", "max-tokens", "context"]
ChatMessage = dict[str, str]


class Tokenizer:
    """The checkpoint's own tokenizer and chat template."""

    def __init__(self, folder: Path, *, fallback_eos: int | None = None) -> None:
        """Load from `trunk/` of a bundle.

        Raises:
            BundleError: there is none.
        """
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise BundleError(f"{folder} has no usable tokenizer: {str(error).partition(chr(10))[0]}") from None
        eos = self._tokenizer.eos_token_id
        self.eos_id: int | None = fallback_eos if eos is None else eos

    @property
    def has_chat_template(self) -> bool:
        """Whether this is a chat model."""
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text."""
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids

    def encode_chat(self, messages: list[ChatMessage]) -> list[int]:
        """Token ids of a conversation, up to where the assistant speaks next."""
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def stream(self) -> "TextStream":
        """A decoder for one sequence of new tokens."""
        return TextStream(self._tokenizer.backend_tokenizer)


class TextStream:
    """Turns ids into text as they come; holds back bytes that don't make a character yet."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, id: int) -> str:
        """Text that has become certain with this token, perhaps empty."""
        return self._stream.step(self._backend, id) or ""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One new token.

    Attributes:
        text: what it adds to the text.
        steps: the forward steps that it took: one, or one per piece of the prompt.
        stop: why the sequence ends here, else None. An end-of-sequence token has no text.
    """

    id: int
    text: str
    steps: tuple[StepRecord, ...]
    stop: StopReason | None


class Sequence:
    """One growing token sequence and its KV cache; prompts that continue it are not computed again."""

    def __init__(self, model: DistributedMixtral, tokenizer: Tokenizer) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._cache = model.trunk.new_cache()
        self._cached_ids: list[int] = []
        self._max_positions: int = model.trunk.config.max_position_embeddings

    def generate(self, prompt: list[int], config: SamplingConfig) -> Iterator[TokenEvent]:
        """Continue `prompt` token by token; the caller may stop at any token.

        Raises:
            ContextLengthError: the prompt leaves no room in the model's context.
            ValueError: the prompt is empty.
            WdmoeError: from the experts.
        """
        if not prompt:
            raise ValueError("the prompt is empty")
        if len(prompt) >= self._max_positions:
            raise ContextLengthError(
                f"the prompt has {len(prompt)} tokens, the model's context is {self._max_positions}: shorten it"
            )
        return self._generate(prompt, config)

    def _generate(self, prompt: list[int], config: SamplingConfig) -> Iterator[TokenEvent]:
        sampler, stream = Sampler(config), self._tokenizer.stream()
        pending = self._reuse_cache(prompt)
        for count in range(1, config.max_tokens + 1):
            steps: list[StepRecord] = []
            for start in range(0, len(pending), PREFILL_CHUNK_TOKENS):
                chunk = pending[start : start + PREFILL_CHUNK_TOKENS]
                (logits,), step = self._model.step([Feed(chunk, self._cache)])
                self._cached_ids += chunk
                steps.append(step)
            id = sampler.choose(logits)
            stop: StopReason | None = None
            if id == self._tokenizer.eos_id:
                stop = "eos"
            elif len(self._cached_ids) + 1 >= self._max_positions:
                stop = "context"
            elif count == config.max_tokens:
                stop = "max-tokens"
            yield TokenEvent(id, "" if stop == "eos" else stream.push(id), tuple(steps), stop)
            if stop:
                return
            pending = [id]

    def _reuse_cache(self, prompt: list[int]) -> list[int]:
        """Cut the cache to what it shares with `prompt`; the ids still to run, at least one."""
        shared = 0
        limit = min(len(self._cached_ids), len(prompt) - 1)
        while shared < limit and self._cached_ids[shared] == prompt[shared]:
            shared += 1
        if shared < len(self._cached_ids):
            self._model.trunk.truncate(self._cache, shared)
            del self._cached_ids[shared:]
        return prompt[shared:]
