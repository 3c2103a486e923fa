"""Control tokens of a chat, such as `</s>` and `<|im_start|>`, which users must not be able to write."""

import json
import re
import secrets
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer as Backend


class ControlTokens:
    """Encodes a chat so that names of control tokens in a message remain text, and those of the template do not.

    Messages are marked, then the template renders them, then the result is encoded. Marks contain a random number, so
    that no message can contain one.
    """

    def __init__(self, backend: Any, eos_ids: Collection[int], chat_template: str | None) -> None:
        """Find the control tokens.

        Args:
            backend: the tokenizer, of the tokenizers library.
            eos_ids: tokens that end an answer.
            chat_template: of the model. Added tokens that it names are control tokens, even if the tokenizer does not
                call them special.
        """
        template = str(chat_template or "")
        added = backend.get_added_tokens_decoder()
        # An assistant's message may well contain such tokens as `<think>`: models write them, and templates look for
        # them.
        self._from_assistant = {t.content: id for id, t in added.items() if t.special or id in eos_ids}
        self._from_others = self._from_assistant | {t.content: id for id, t in added.items() if t.content in template}
        self._backend = backend
        nonce = secrets.randbits(64)
        # Private use characters and digits: no template changes their case or takes them for white space.
        self._marks = {name: f"\U000f0000{nonce}.{id}\U000f0001" for name, id in self._from_others.items()}
        self._names = {mark: name for name, mark in self._marks.items()}
        self._tokens = {name: f"\U000f0002{nonce}.{id}\U000f0003" for name, id in self._from_others.items()}

    def mark(self, message: Mapping[str, str]) -> dict[str, str]:
        """The message, with a mark in place of each name of a control token in its texts."""
        names = self._from_assistant if message.get("role") == "assistant" else self._from_others
        return {
            key: _replace(text, {name: self._marks[name] for name in names}) if key != "role" else text
            for key, text in message.items()
        }

    def unmark(self, text: str) -> str:
        """The text with names in place of marks."""
        return _replace(text, self._names)

    def encode(self, rendered: str) -> list[int]:
        """Token ids of a rendered chat with marked messages."""
        text = self.unmark(_replace(rendered, self._tokens))
        ids: list[int] = self._literal_backend.encode(text, add_special_tokens=False).ids
        return ids

    @cached_property
    def _literal_backend(self) -> Any:
        """A tokenizer that knows control tokens by other names, so that it takes their own names for text."""
        definition = json.loads(self._backend.to_str())
        for token in definition["added_tokens"]:
            if token["content"] in self._tokens:
                token |= {"content": self._tokens[token["content"]], "special": False, "normalized": False}
        _rename(definition["model"], self._tokens)
        backend: Any = Backend.from_str(json.dumps(definition))
        backend.encode_special_tokens = True
        return backend


def _rename(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Rename tokens in the definition of a tokenizer's model, whose own pieces may be control tokens' names."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: pieces with their scores
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
        return
    model["vocab"] = {names.get(piece, piece): id for piece, id in vocabulary.items()}
    if isinstance(unknown := model.get("unk_token"), str):
        model["unk_token"] = names.get(unknown, unknown)
    if "merges" in model:
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if names.keys().isdisjoint((*pair, "".join(pair)))]


def _replace(text: str, by: Mapping[str, str]) -> str:
    """The text with each key of `by` replaced, the longest where several begin at one place."""
    if not by:
        return text
    pattern = "|".join(re.escape(key) for key in sorted(by, key=len, reverse=True))
    return re.sub(pattern, lambda found: by[found.group()], text)
