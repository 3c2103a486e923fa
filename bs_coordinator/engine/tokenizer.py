"""Text to token ids and back, with the checkpoint's own tokenizer."""

import contextlib
import functools
import json
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer

from bs_coordinator.engine.control_tokens import ControlTokens
from bs_coordinator.engine.template_process import PROCESSES, TemplateEndedError, TemplateFailedError
from bs_coordinator.errors import ChatTemplateError
from wire.errors import BundleError

ChatMessage = dict[str, str]

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + i): byte for i, byte in enumerate(byte for byte in range(0x100) if byte not in _PRINTABLE)
}
"""The bytes that byte-level vocabularies write as these characters (GPT-2's `bytes_to_unicode`)."""


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
    """The checkpoint's own tokenizer and chat template.

    Attributes:
        eos_ids: tokens that end an answer: those that the tokenizer, `config.json` and `generation_config.json` name.
        special_tokens: special tokens by id. They are no part of an answer's text.
    """

    def __init__(self, folder: Path) -> None:
        """Load from the `trunk/` folder of a bundle.

        Raises:
            BundleError: the folder has no usable tokenizer.
        """
        model, fast = folder / "tokenizer.model", folder / "tokenizer.json"
        if model.is_file() and not fast.is_file() and find_spec("sentencepiece") is None:
            raise BundleError(f"{model} needs a library that is not installed: pip install sentencepiece")
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # noqa: BLE001 - tokenizers raises bare Exception
            raise BundleError(f"{folder} has no usable tokenizer: {str(error).partition(chr(10))[0]}") from None
        # tokenizer.json may ask to cut texts, or to fill them up, as in the training that it comes from.
        self._tokenizer.backend_tokenizer.no_truncation()
        self._tokenizer.backend_tokenizer.no_padding()
        named = [self._tokenizer.eos_token_id, *_named_eos_ids(folder)]
        self.eos_ids = frozenset(id for id in named if id is not None)
        added = self._tokenizer.backend_tokenizer.get_added_tokens_decoder()
        self.special_tokens: dict[int, str] = {id: token.content for id, token in added.items() if token.special}
        self._byte_level = "ByteLevel" in repr(self._tokenizer.backend_tokenizer.decoder)
        self._control = ControlTokens(self._tokenizer.backend_tokenizer, self.eos_ids, self._tokenizer.chat_template)

    @property
    def ids(self) -> dict[str, int]:
        """The vocabulary: every token and its id."""
        ids: dict[str, int] = self._tokenizer.get_vocab()
        return ids

    @property
    def size(self) -> int:
        """Number of tokens in the vocabulary, with those that were added to it."""
        return len(self._tokenizer)

    @property
    def description(self) -> dict[str, str | None]:
        """Names of the special tokens by their role (None if there is none), and the chat template."""
        roles = ("bos_token", "eos_token", "pad_token", "unk_token")
        names = {role: getattr(self._tokenizer, role, None) for role in roles}
        template = self._tokenizer.chat_template
        return {**names, "chat_template": template if isinstance(template, str) else None}

    @functools.cached_property
    def longest_token(self) -> int:
        """Length of the longest token of the vocabulary, in characters as the vocabulary writes them."""
        return max(len(token) for token in self.ids)

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint has a chat template."""
        return bool(self._tokenizer.chat_template)

    @_panics_as_errors()
    def encode(self, text: str, *, begin: bool = True) -> list[int]:
        """Token ids of plain text. Special tokens may be written in it by name.

        Args:
            begin: add the special tokens that the tokenizer puts around a text, such as `<s>`.
        """
        # Not verbose: transformers would print a warning for texts beyond the context, which callers refuse in words.
        ids: list[int] = self._tokenizer(text, add_special_tokens=begin, verbose=False)["input_ids"]
        return ids

    @_panics_as_errors()
    def encode_chat(self, messages: list[ChatMessage]) -> list[int]:
        """Token ids of a conversation, up to the start of the assistant's next message.

        Names of control tokens in a message are text: only the template's own become control tokens.

        Raises:
            ChatTemplateError: the chat template refuses the messages, for example a system message, fails, or takes
                too much time or memory.
        """
        marked = [self._control.mark(message) for message in messages]
        text = self._render_chat(marked)
        if marked != messages:
            return self._control.encode(text)
        return self.encode(text, begin=False)

    def _render_chat(self, messages: list[ChatMessage]) -> str:
        """The conversation as the model's chat template writes it."""
        try:
            # ValueError: the checkpoint has no template, or several and none of them by default.
            template: str = self._tokenizer.get_chat_template()
            return PROCESSES.render(template, messages, self._tokenizer.special_tokens_map)
        except TemplateEndedError as error:
            raise ChatTemplateError(f"the model's chat template can't write these messages: {error}") from None
        except (
            TemplateFailedError,
            ValueError,
        ) as error:
            reason = self._control.unmark(str(error)).partition("\n")[0]
        others = [message for message in messages if message["role"] != "system"]
        if others and len(others) < len(messages):
            with contextlib.suppress(ChatTemplateError):
                self._render_chat(others)
                reason = f"it takes no system message ({reason}); put its text into the first user message instead"
        raise ChatTemplateError(f"the model's chat template refuses these messages: {reason}")

    @_panics_as_errors()
    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of token ids.

        Args:
            special: with the names of special tokens.
        """
        text: str = self._tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=not special)
        return text

    @_panics_as_errors()
    def token_bytes(self, id: int) -> bytes:
        """What one token contributes to a text, as UTF-8, which may be a part of a character; a special token's name.

        Ids beyond the vocabulary, for which some models have logits, have no bytes.
        """
        backend = self._tokenizer.backend_tokenizer
        name = backend.id_to_token(id)
        if name is None:
            return b""
        if id in backend.get_added_tokens_decoder():
            return str(name).encode()
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", name):
            return bytes.fromhex(byte[1])
        if self._byte_level and all(character in _BYTES for character in name):
            return bytes(_BYTES[character] for character in name)
        # Decoders change the beginning of a text: the token is decoded behind itself.
        once, twice = backend.decode([id]), backend.decode([id, id])
        return str(twice)[len(once) :].encode()

    @_panics_as_errors()
    def stream(self, continued: Sequence[int] = ()) -> "TextStream":
        """A decoder for one sequence of new tokens.

        Args:
            continued: the tokens that the new ones continue. Many tokenizers drop the first space of a text, which
                belongs to the text where it continues another. Without them the new tokens are a text of their own.
        """
        return TextStream(self._tokenizer.backend_tokenizer, continued)


class TextStream:
    """Decodes ids into text one at a time; holds back bytes that do not form a character yet."""

    def __init__(self, backend: Any, continued: Sequence[int] = ()) -> None:
        """Begin after the tokens `continued`, whose text is not repeated."""
        self._backend = backend
        ids = list(continued)
        # DecodeStream takes a context that ends in U+FFFD for an unfinished character, and would repeat all of it.
        if ids and backend.decode(ids, skip_special_tokens=True).endswith("\N{REPLACEMENT CHARACTER}"):
            ids = []
        self._stream = DecodeStream(ids=ids, skip_special_tokens=True)
        self._last = ids[-1:]

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


def _named_eos_ids(folder: Path) -> list[int]:
    """End tokens that the model's configuration files name: one each, or several."""
    ids: list[int] = []
    for name in ("config.json", "generation_config.json"):
        try:
            named = json.loads((folder / name).read_bytes()).get("eos_token_id")
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError) as error:
            raise BundleError(f"{folder / name} is not a model's configuration: {error}") from None
        several = named if isinstance(named, list) else [named]
        ids += [id for id in several if isinstance(id, int) and not isinstance(id, bool)]
    return ids
