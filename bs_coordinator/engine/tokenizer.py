"""Text to token ids and back, with the checkpoint's own tokenizer."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer

from bs_coordinator.errors import ChatTemplateError
from wire.errors import BundleError

ChatMessage = dict[str, str]


@contextlib.contextmanager
def _panics_as_errors() -> Iterator[None]:
    """Raise a panic of the tokenizers library as a RuntimeError: as it comes, it is no `Exception`."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__module__ != "pyo3_runtime":
            raise
        raise RuntimeError(f"the tokenizer failed: {error}") from None


class Tokenizer:
    """The checkpoint's own tokenizer and chat template."""

    def __init__(self, folder: Path, *, fallback_eos: int | None = None) -> None:
        """Load from the `trunk/` folder of a bundle.

        Args:
            folder: with the tokenizer's files.
            fallback_eos: end-of-sequence token, where the tokenizer does not name one.

        Raises:
            BundleError: the folder has no usable tokenizer.
        """
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise BundleError(f"{folder} has no usable tokenizer: {str(error).partition(chr(10))[0]}") from None
        eos = self._tokenizer.eos_token_id
        self.eos_id: int | None = fallback_eos if eos is None else eos

    @property
    def ids(self) -> dict[str, int]:
        """The vocabulary: every token and its id."""
        ids: dict[str, int] = self._tokenizer.get_vocab()
        return ids

    @property
    def size(self) -> int:
        """Number of tokens in the vocabulary, with those that were added to it."""
        return len(self._tokenizer)

    @functools.cached_property
    def longest_token(self) -> int:
        """Length of the longest token of the vocabulary, in characters as the vocabulary writes them."""
        return max(len(token) for token in self.ids)

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint has a chat template."""
        return bool(self._tokenizer.chat_template)

    @_panics_as_errors()
    def encode(self, text: str) -> list[int]:
        """Token ids of plain text."""
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids

    @_panics_as_errors()
    def encode_chat(self, messages: list[ChatMessage]) -> list[int]:
        """Token ids of a conversation, up to the start of the assistant's next message.

        Raises:
            ChatTemplateError: the chat template refuses the messages, for example a system message, or fails.
        """
        text = self._render_chat(messages)
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _render_chat(self, messages: list[ChatMessage]) -> str:
        """The conversation as the model's chat template writes it."""
        try:
            text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return text
        except Exception as error:  # noqa: BLE001 - a template is a program of the checkpoint's, which raises anything
            reason = str(error).partition("\n")[0] or type(error).__name__
        others = [message for message in messages if message["role"] != "system"]
        if others and len(others) < len(messages):
            with contextlib.suppress(ChatTemplateError):
                self._render_chat(others)
                reason = f"it takes no system message ({reason}); put its text into the first user message instead"
        raise ChatTemplateError(f"the model's chat template refuses these messages: {reason}")

    def stream(self) -> "TextStream":
        """A decoder for one sequence of new tokens."""
        return TextStream(self._tokenizer.backend_tokenizer)


class TextStream:
    """Decodes ids into text one at a time; holds back bytes that do not form a character yet."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=True)
        self._last: list[int] = []

    @_panics_as_errors()
    def push(self, id: int) -> str:
        """The text that this token completes, perhaps empty; U+FFFD stands for bytes that form no character."""
        try:
            text = self._stream.step(self._backend, id)
        except Exception:  # noqa: BLE001 - tokenizers raises bare Exception
            # DecodeStream fails where the bytes it held back turn out to form no character: start again behind them.
            self._stream = DecodeStream(ids=self._last, skip_special_tokens=True)
            text = self._stream.step(self._backend, id)
        self._last = [id]
        return text or ""
