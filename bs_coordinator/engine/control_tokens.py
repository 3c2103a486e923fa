"""Control tokens of a chat, such as `</s>` and `<|im_start|>`, which users must not be able to write."""

import json
import re
import secrets
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any

from tokenizers import AddedToken
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
        backend, ids = self._literal_backend
        text = self.unmark(_replace(rendered, self._tokens))
        return [ids.get(id, id) for id in backend.encode(text, add_special_tokens=False).ids]

    @cached_property
    def _literal_backend(self) -> tuple[Any, dict[int, int]]:
        """A tokenizer that takes control tokens' names for text and knows them by other names; true ids by its ids."""
        definition = json.loads(self._backend.to_str())
        for token in definition["added_tokens"]:
            token["special"] = token["special"] or token["content"] in self._from_others
        backend: Any = Backend.from_str(json.dumps(definition))
        backend.encode_special_tokens = True
        added = self._backend.get_added_tokens_decoder()
        ids = {}
        for name, id in self._from_others.items():
            token = added[id]
            alias = AddedToken(
                self._tokens[name], single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip,
                normalized=False, special=False,
            )  # fmt: skip
            backend.add_tokens([alias])
            ids[backend.token_to_id(self._tokens[name])] = id
        return backend, ids


def _replace(text: str, by: Mapping[str, str]) -> str:
    """The text with each key of `by` replaced, the longest where several begin at one place."""
    if not by:
        return text
    pattern = "|".join(re.escape(key) for key in sorted(by, key=len, reverse=True))
    return re.sub(pattern, lambda found: by[found.group()], text)
