"""Prompts to token ids, in threads: bounded before any work is done, and apart from the loop that serves streams."""

import asyncio
from collections.abc import Callable

from starlette.exceptions import HTTPException

from bs_coordinator.engine.template_process import MOST_AT_ONCE
from bs_coordinator.engine.tokenizer import ChatMessage, Tokenizer
from bs_coordinator.errors import ChatTemplateError
from common.errors import one_line

_LONG_CHARACTERS = 1 << 14
"""Longer prompts, and as many token ids, are processed one at a time: they take no more than one core from answers."""


class PromptEncoder:
    """Tokenises prompts of callers, each in a thread."""

    def __init__(self, tokenizer: Tokenizer, max_positions: int) -> None:
        """Remember the limits.

        Args:
            max_positions: the model's context length in tokens.
        """
        self._tokenizer = tokenizer
        self._max_positions = max_positions
        self._long = asyncio.Semaphore(1)
        self._chats = asyncio.Semaphore(MOST_AT_ONCE)

    async def encode(self, prompt: str | list[int], *, begin: bool = True) -> list[int]:
        """Token ids of a text, or the ids themselves if they are in the vocabulary.

        Args:
            prompt: a text or token ids.
            begin: as for `Tokenizer.encode`.

        Raises:
            HTTPException: 400, because the prompt can't be tokenised or certainly exceeds the context.
        """
        if isinstance(prompt, str):
            return await self._run(len(prompt), lambda: self._tokenizer.encode(prompt, begin=begin))
        self._check(prompt, "prompt")
        return prompt

    async def decode(self, ids: list[int]) -> str:
        """The text of token ids, with the names of special tokens.

        Raises:
            HTTPException: 400, because the vocabulary has no such token.
        """
        self._check(ids, "tokens")
        if len(ids) <= _LONG_CHARACTERS:
            return await asyncio.to_thread(self._tokenizer.decode, ids, special=True)
        async with self._long:
            return await asyncio.to_thread(self._tokenizer.decode, ids, special=True)

    def _check(self, ids: list[int], name: str) -> None:
        last = self._tokenizer.size - 1
        if max(ids, default=0) > last:
            raise HTTPException(400, f"`{name}` has token {max(ids)}, but the vocabulary ends at {last}")

    async def encode_chat(self, conversation: list[ChatMessage]) -> list[int]:
        """Token ids of a conversation in the model's chat template.

        Raises:
            HTTPException: as for `encode`, or the template refuses the conversation.
        """
        characters = sum(len(message["content"]) for message in conversation)
        async with self._chats:
            return await self._run(characters, lambda: self._tokenizer.encode_chat(conversation))

    async def _run(self, characters: int, encode: Callable[[], list[int]]) -> list[int]:
        most = self._max_positions * self._tokenizer.longest_token
        if characters > most:
            raise HTTPException(
                400,
                f"the prompt has {characters} characters, and the model's context of {self._max_positions} tokens "
                f"holds at most {most}: shorten it",
            )
        try:
            if characters <= _LONG_CHARACTERS:
                ids = await asyncio.to_thread(encode)
            else:
                async with self._long:
                    ids = await asyncio.to_thread(encode)
        except ChatTemplateError as error:
            raise HTTPException(400, str(error)) from None
        except Exception as error:  # noqa: BLE001 - templates are programs, and tokenizers raises bare Exception
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise HTTPException(400, f"this prompt can't be tokenised: {reason}") from None
        if not ids:
            raise HTTPException(400, "the prompt has no tokens")
        return ids
