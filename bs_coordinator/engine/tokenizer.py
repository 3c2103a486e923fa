"""Text to token ids and back: the checkpoint's own tokenizer."""

from pathlib import Path
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer

from wire.errors import BundleError

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
    def ids(self) -> dict[str, int]:
        """Every token and its id."""
        ids: dict[str, int] = self._tokenizer.get_vocab()
        return ids

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
        self._last: list[int] = []

    def push(self, id: int) -> str:
        """Text that has become certain with this token, perhaps empty; U+FFFD for bytes that became no character."""
        try:
            text = self._stream.step(self._backend, id)
        except Exception:  # noqa: BLE001 - tokenizers has no class of its own for it
            # A byte that was the beginning of nothing, after one that was: it stumbles over the text that it gave out.
            self._stream = DecodeStream(ids=self._last, skip_special_tokens=True)
            text = self._stream.step(self._backend, id)
        self._last = [id]
        return text or ""
