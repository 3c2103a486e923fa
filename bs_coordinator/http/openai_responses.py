"""Responses as OpenAI's clients read them: whole documents, chunks of a stream, errors.

Source: the OpenAI API reference (completions, chat completions, errors). A field of our own, `wdmoe.degraded_tokens`,
counts the tokens that had to do without an expert.
"""

import secrets
import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from bs_coordinator.engine.sequence import StopReason, TokenEvent

Finish = Literal["stop", "length"]
ResponseKind = Literal["text_completion", "chat.completion"]
_FINISH: dict[StopReason, Finish] = {"eos": "stop", "max-tokens": "length", "context": "length"}

STREAM_END = b"data: [DONE]\n\n"


class Token(NamedTuple):
    """The part of a `TokenEvent` that a caller gets.

    An event's records of its steps are large (58 KiB): they must not pile up for callers that read slowly.

    Attributes:
        finish: why the answer ends with this token; None if it does not.
        degraded: an expert was missing when it was computed.
        id: of the token; None for text that belongs to several.
    """

    text: str
    finish: Finish | None
    degraded: bool
    id: int | None = None

    @classmethod
    def of(cls, event: TokenEvent) -> "Token":
        """The token of an event."""
        degraded = any(layer.degraded for step in event.steps for layer in step.layers)
        return cls(event.text, _FINISH[event.stop] if event.stop else None, degraded, event.id)


class ResponseFormat:
    """How one answer is written: completions and chat differ in the names of fields only."""

    def __init__(self, kind: ResponseKind, model: str, prompt_tokens: int) -> None:
        """Draw the answer's id.

        Args:
            model: name of the model.
            prompt_tokens: length of the prompt.
        """
        self._chat = kind == "chat.completion"
        self._head = {"id": f"wdmoe-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._kind = kind
        self._prompt_tokens = prompt_tokens

    def document(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """The response to a request without `stream`; the last token has `finish`."""
        text = "".join(token.text for token in tokens)
        content = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        return {**self._head, "object": self._kind, "choices": [_choice(content, tokens[-1])], **self._usage(tokens)}

    def chunk(self, token: Token, *, first: bool = False) -> bytes:
        """One token of a stream."""
        role = {"role": "assistant"} if first else {}
        content = {"delta": {**role, "content": token.text}} if self._chat else {"text": token.text}
        return self._chunk({"choices": [_choice(content, token)]})

    def usage_chunk(self, tokens: Sequence[Token]) -> bytes:
        """The last chunk of a stream with `stream_options.include_usage`."""
        return self._chunk({"choices": [], **self._usage(tokens)})

    def _chunk(self, content: dict[str, Any]) -> bytes:
        return server_sent_event(
            {**self._head, "object": f"{self._kind}.chunk" if self._chat else self._kind, **content}
        )

    def _usage(self, tokens: Sequence[Token]) -> dict[str, Any]:
        prompt, new = self._prompt_tokens, len(tokens)
        return {
            "usage": {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new},
            "wdmoe": {"degraded_tokens": sum(token.degraded for token in tokens)},
        }


def error_document(status: int, message: str) -> dict[str, Any]:
    """The body of a response that is an error."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "code": status}}


def server_sent_event(document: dict[str, Any]) -> bytes:
    """One event of a stream (WHATWG HTML, server-sent events)."""
    return b"data: " + msgspec.json.encode(document) + b"\n\n"


def _choice(content: dict[str, Any], last: Token) -> dict[str, Any]:
    return {"index": 0, **content, "finish_reason": last.finish}
