"""The HTTP interface: completions and chat as OpenAI's clients ask for them, and an honest health check.

Source: the OpenAI API reference (completions, chat completions, models). Starlette does routing and streaming.
"""

import asyncio
import contextlib
import hmac
import secrets
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from bs_coordinator.generate import StopReason, TokenEvent, Tokenizer
from bs_coordinator.sampling import SamplingConfig
from bs_coordinator.serving import AnswerServer, News
from wire.errors import BusyError, ContextLengthError, WdmoeError

MAX_BODY_BYTES = 1 << 20
_DISCONNECT_S = 1.0
_FINISH: dict[StopReason, str] = {"eos": "stop", "max-tokens": "length", "context": "length"}


class _Options(Struct, kw_only=True):
    model: str = ""
    max_tokens: Annotated[int, Meta(ge=1)] = 256
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=10)] = 0.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    seed: Annotated[int, Meta(ge=0)] = 0
    stream: bool = False
    # What would change the answer if it were ignored is refused instead.
    n: Literal[1] | None = None
    stop: None = None
    logprobs: None = None
    tools: None = None

    @property
    def sampling(self) -> SamplingConfig:
        tokens = self.max_completion_tokens or self.max_tokens
        return SamplingConfig(tokens, self.temperature, self.top_p, self.seed)


class _Completion(_Options, kw_only=True):
    prompt: Annotated[str, Meta(min_length=1)]


class _Message(Struct):
    role: Literal["system", "user", "assistant"]
    content: str


class _Chat(_Options, kw_only=True):
    messages: Annotated[list[_Message], Meta(min_length=1)]


_Asked = TypeVar("_Asked", bound=_Options)


def http_app(
    server: AnswerServer, tokenizer: Tokenizer, *, model: str, api_key: str | None, stall_s: float
) -> Starlette:
    """The application.

    Args:
        model: name to list.
        api_key: that callers must have.
        stall_s: without progress for longer than this the server does not call itself healthy.
    """

    def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if api_key is not None and not hmac.compare_digest(given, api_key.encode()):
            raise HTTPException(401, "a valid API key is needed: Authorization: Bearer …")

    async def completions(request: Request) -> Response:
        check_key(request)
        asked = await _body(request, _Completion)
        return await _answer(server, request, asked, tokenizer.encode(asked.prompt), _Shape("text_completion", model))

    async def chat(request: Request) -> Response:
        check_key(request)
        if not tokenizer.has_chat_template:
            raise HTTPException(400, "this model has no chat template: use /v1/completions")
        asked = await _body(request, _Chat)
        ids = tokenizer.encode_chat([{"role": m.role, "content": m.content} for m in asked.messages])
        return await _answer(server, request, asked, ids, _Shape("chat.completion", model))

    async def models(request: Request) -> Response:
        check_key(request)
        return JSONResponse({"object": "list", "data": [{"id": model, "object": "model", "owned_by": "wdmoe"}]})

    async def health(request: Request) -> Response:
        load = server.load()
        well = not load.lost and load.stalled_s <= stall_s
        state = {
            "status": "ok" if well else "failing",
            "requests": load.requests,
            "stalled_s": round(load.stalled_s, 1),
        }
        if load.lost:
            state["reason"] = load.lost
        return JSONResponse(state, 200 if well else 503)

    return Starlette(
        routes=[
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
        ],
        exception_handlers={HTTPException: _http_error},  # type: ignore[dict-item] # handlers take their own kind
    )


class _Shape:
    """How one answer is written: completions and chat differ in names only."""

    def __init__(self, kind: Literal["text_completion", "chat.completion"], model: str) -> None:
        self._chat = kind == "chat.completion"
        self._head = {"id": f"wdmoe-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._kind = kind

    def whole(self, text: str, finish: str, usage: dict[str, int], degraded: int) -> dict[str, Any]:
        content = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        return {
            **self._head, "object": self._kind, "choices": [{"index": 0, **content, "finish_reason": finish}],
            "usage": usage, "wdmoe": {"degraded_tokens": degraded},
        }  # fmt: skip

    def piece(self, text: str, finish: str | None) -> bytes:
        content = {"delta": {"content": text}} if self._chat else {"text": text}
        kind = f"{self._kind}.chunk" if self._chat else self._kind
        return _sse({**self._head, "object": kind, "choices": [{"index": 0, **content, "finish_reason": finish}]})


async def _answer(server: AnswerServer, request: Request, asked: _Options, ids: list[int], shape: _Shape) -> Response:
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[News] = asyncio.Queue()

    def deliver(news: News) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is listening any more
            loop.call_soon_threadsafe(arrived.put_nowait, news)

    try:
        accepted = server.submit(ids, asked.sampling, deliver)
    except BusyError as error:
        raise HTTPException(429, str(error), {"Retry-After": f"{error.retry_after_s:.0f}"}) from None

    async def events() -> AsyncIterator[TokenEvent]:
        try:
            while True:
                try:
                    news = await asyncio.wait_for(arrived.get(), _DISCONNECT_S)
                except TimeoutError:
                    if await request.is_disconnected():
                        return
                    continue
                if news.error:
                    raise news.error
                for event in news.events:
                    yield event
                    if event.stop:
                        return
        finally:
            server.cancel(accepted)

    if asked.stream:
        return StreamingResponse(_stream(events(), shape), media_type="text/event-stream")
    text, count, degraded, finish = "", 0, 0, "stop"
    try:
        async for event in events():
            text += event.text
            count += 1
            degraded += _is_degraded(event)
            finish = _FINISH[event.stop] if event.stop else finish
    except WdmoeError as error:
        raise HTTPException(400 if isinstance(error, ContextLengthError) else 503, str(error)) from None
    usage = {"prompt_tokens": len(ids), "completion_tokens": count, "total_tokens": len(ids) + count}
    return JSONResponse(shape.whole(text, finish, usage, degraded))


async def _stream(events: AsyncIterator[TokenEvent], shape: _Shape) -> AsyncIterator[bytes]:
    try:
        async for event in events:
            yield shape.piece(event.text, _FINISH[event.stop] if event.stop else None)
    except WdmoeError as error:
        # The status line has been sent: the error is the stream's last word.
        yield _sse(_error(503, str(error)))
    yield b"data: [DONE]\n\n"


async def _body(request: Request, kind: type[_Asked]) -> _Asked:
    raw = b""
    async for part in request.stream():
        raw += part
        if len(raw) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the request is longer than {MAX_BODY_BYTES} bytes")
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HTTPException(400, f"not a request that can be answered: {error}") from None


def _is_degraded(event: TokenEvent) -> bool:
    return any(layer.degraded for step in event.steps for layer in step.layers)


def _sse(document: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(document) + b"\n\n"


def _error(code: int, message: str) -> dict[str, Any]:
    kind = "server_error" if code >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "code": code}}


async def _http_error(request: Request, error: HTTPException) -> Response:
    return JSONResponse(_error(error.status_code, error.detail), error.status_code, headers=error.headers)
