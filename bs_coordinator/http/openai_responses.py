"""Responses as OpenAI's clients read them: whole documents, chunks of a stream, errors.

Source: the OpenAI API reference (completions, chat completions, errors). The field `wdmoe` is our own.
"""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple, Protocol

import msgspec

from bs_coordinator.engine.logprobs import TokenLogprob
from bs_coordinator.engine.sequence import StopReason, TokenEvent
from bs_coordinator.engine.step_parts import Parts, parts_ms

Finish = Literal["stop", "length"]
ResponseKind = Literal["text_completion", "chat.completion"]
_FINISH: dict[StopReason, Finish] = {"eos": "stop", "max-tokens": "length", "context": "length"}

STREAM_END = b"data: [DONE]\n\n"


class Token(NamedTuple):
    """The part of a `TokenEvent` that a caller gets.

    An event's records of its steps are large (58 KiB): they must not pile up for callers that read slowly.

    Attributes:
        finish: why the answer ends with this token; None if it does not.
        degraded: as of `TokenEvent`.
        id: of the token; None for text that belongs to several.
        logprob: of the token, if it was asked for.
        prompt: with the first token, those of the prompt's tokens but the first, if they were asked for.
        step_ns: time of the steps that it took.
        wait_ns: the part of `step_ns` between choosing experts and having their combined output.
        drafted, accepted: draft tokens in these steps, and how many of them were accepted.
        parts: where the time of these steps went, if it was asked for.
    """

    text: str
    finish: Finish | None
    degraded: bool
    id: int | None = None
    logprob: TokenLogprob | None = None
    prompt: tuple[TokenLogprob, ...] = ()
    step_ns: int = 0
    wait_ns: int = 0
    drafted: int = 0
    accepted: int = 0
    parts: Parts | None = None

    @classmethod
    def of(cls, event: TokenEvent, *, timed: bool = False) -> "Token":
        """The token of an event.

        Args:
            timed: with the parts of its time.
        """
        layers = [layer for step in event.steps for layer in step.layers]
        return cls(
            event.text,
            _FINISH[event.stop] if event.stop else None,
            event.degraded,
            event.id,
            event.logprob,
            event.prompt,
            sum(step.total_ns for step in event.steps),
            sum(layer.dispatch_ns for layer in layers),
            sum(step.drafted for step in event.steps),
            sum(step.accepted for step in event.steps),
            parts_ms(*event.steps) if timed else None,
        )


class Prompt(NamedTuple):
    """A prompt as answers that echo it begin.

    Attributes:
        text: as it was sent, or as its tokens spell it.
        first: its first token, which no probability belongs to.
    """

    text: str
    first: int


class Totals(Protocol):
    """What a response says about all of its choices (`bs_coordinator.http.tally`)."""

    @property
    def usage(self) -> dict[str, int]: ...

    def details(self, about: Mapping[str, Any]) -> dict[str, Any]: ...


class ResponseFormat:
    """How the answers to one request are written: completions and chat differ in the names of fields only.

    Attributes:
        id: of the response.
    """

    def __init__(
        self, kind: ResponseKind, id: str, model: str, totals: Totals, token_bytes: Callable[[int], bytes], *,
        about: Mapping[str, Any] | None = None, logprobs: bool = False, echoed: Sequence[Prompt] = (),
        usage_in_chunks: bool = False,
    ) -> None:  # fmt: skip
        """Nothing is written yet.

        Args:
            id: of the response.
            model: name of the model.
            totals: adds up the tokens; read when they have all come, or for each chunk.
            token_bytes: what a token contributes to a text.
            about: how the base station is configured, for the field `wdmoe`.
            logprobs: the tokens have log-probabilities.
            echoed: the prompt that each choice begins with; empty if they don't.
            usage_in_chunks: each chunk has the number of tokens so far.
        """
        self._chat = kind == "chat.completion"
        self._head = {"id": id, "created": int(time.time()), "model": model}
        self._kind = kind
        self._totals = totals
        self._token_bytes = token_bytes
        self._about = about or {}
        self._logprobs = logprobs
        self._echoed = echoed
        self._usage_in_chunks = usage_in_chunks
        self._offsets: dict[int, int] = {}
        """Characters that the tokens of each choice have had in chunks."""

    def document(self, choices: Mapping[int, Sequence[Token]]) -> dict[str, Any]:
        """The response to a request without `stream`; the last token of each choice has `finish`."""
        written = [self._choice(index, tokens, first=True) for index, tokens in sorted(choices.items())]
        return {**self._head, "object": self._kind, "choices": written, **self._account()}

    def chunk(self, index: int, token: Token) -> bytes:
        """One token of a stream, of the choice `index`."""
        first = index not in self._offsets
        choice = self._choice(index, [token], first=first)
        if self._chat:
            delta = {"content": choice.pop("message")["content"]}
            role = {"role": "assistant"} if first else {}
            choice = {"index": index, "delta": {**role, **delta}, **choice}
        usage = {"usage": self._totals.usage} if self._usage_in_chunks else {}
        timings = {"wdmoe": {"token": token.id, **token.parts}} if token.parts else {}
        return self._chunk({"choices": [choice], **usage, **timings})

    def usage_chunk(self) -> bytes:
        """The last chunk of a stream with `stream_options.include_usage`."""
        return self._chunk({"choices": [], **self._account()})

    def _chunk(self, content: dict[str, Any]) -> bytes:
        return server_sent_event(
            {**self._head, "object": f"{self._kind}.chunk" if self._chat else self._kind, **content}
        )

    def _account(self) -> dict[str, Any]:
        return {"usage": self._totals.usage, "wdmoe": self._totals.details(self._about)}

    def _choice(self, index: int, tokens: Sequence[Token], *, first: bool) -> dict[str, Any]:
        offset = self._offsets.setdefault(index, 0)
        text = "".join(token.text for token in tokens)
        scored = [score for token in tokens for score in (*token.prompt, token.logprob) if score is not None]
        echoed = self._echoed[index] if self._echoed and first else None
        content: dict[str, Any]
        logprobs: dict[str, Any]
        if self._chat:
            content = {"message": {"role": "assistant", "content": text}}
            logprobs = {"content": [self._chat_logprob(score) for score in scored], "refusal": None}
        else:
            content = {"text": echoed.text + text if echoed else text}
            logprobs = self._completion_logprobs(scored, echoed.first if echoed else None, offset)
            self._offsets[index] += sum(map(len, logprobs["tokens"]))
        if self._logprobs:
            content["logprobs"] = logprobs
        return {"index": index, **content, "finish_reason": tokens[-1].finish}

    def _completion_logprobs(
        self, scored: Sequence[TokenLogprob], unscored: int | None, offset: int
    ) -> dict[str, list[Any]]:
        """`logprobs` of a completion.

        Args:
            unscored: a token before the others that has no probability.
            offset: number of characters before the first token.
        """
        tokens: list[str] = [] if unscored is None else [self._name(unscored)]
        values: list[float | None] = [None] * len(tokens)
        tops: list[dict[str, float] | None] = [None] * len(tokens)
        for score in scored:
            tokens.append(self._name(score.id))
            values.append(score.logprob)
            # Tokens may have the same text: the more probable one counts. The chosen one is always named.
            top: dict[str, float] = {}
            for id, value in (*score.top, (score.id, score.logprob)):
                top.setdefault(self._name(id), value)
            tops.append(top)
        *offsets, _ = accumulate(map(len, tokens), initial=offset)
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _chat_logprob(self, score: TokenLogprob) -> dict[str, Any]:
        top = [self._named(id, value) for id, value in score.top]
        return {**self._named(score.id, score.logprob), "top_logprobs": top}

    def _named(self, id: int, value: float) -> dict[str, Any]:
        raw = self._token_bytes(id)
        return {"token": raw.decode("utf-8", "replace"), "logprob": value, "bytes": list(raw)}

    def _name(self, id: int) -> str:
        """A token's text; the bytes of one that is a part of a character, as OpenAI writes them."""
        raw = self._token_bytes(id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def new_id() -> str:
    """The id of a response."""
    return f"wdmoe-{secrets.token_hex(12)}"


def error_document(status: int, message: str) -> dict[str, Any]:
    """The body of a response that is an error."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "code": status}}


def server_sent_event(document: dict[str, Any]) -> bytes:
    """One event of a stream (WHATWG HTML, server-sent events)."""
    return b"data: " + msgspec.json.encode(document) + b"\n\n"


def comment(text: str) -> bytes:
    """A line of a stream that clients ignore, which keeps connections through proxies open."""
    return f": {text}\n\n".encode()
