"""The HTTP interface: completions and chat as OpenAI's clients ask for them, and an honest health check.

Source: the OpenAI API reference (completions, chat completions, models). Starlette does routing and streaming.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from hmac import compare_digest
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec
from jinja2 import TemplateError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from bs_coordinator.engine.sequence import StopReason, TokenEvent
from bs_coordinator.engine.tokenizer import Tokenizer
from bs_coordinator.errors import BusyError, ContextLengthError
from bs_coordinator.http.answer_server import AnswerServer, StreamUpdate
from bs_coordinator.http.openai_schema import Chat, Completion, Options, parse_request
from bs_coordinator.http.stop_strings import StopText
from common.errors import WdmoeError

MAX_BODY_BYTES = 1 << 20
_Finish = Literal["stop", "length"]
_FINISH: dict[StopReason, _Finish] = {"eos": "stop", "max-tokens": "length", "context": "length"}

_Asked = TypeVar("_Asked", bound=Options)


def http_app(
    server: AnswerServer, tokenizer: Tokenizer, *, model: str, api_key: str | None, stall_s: float
) -> Starlette:
    """The application.

    Args:
        model: name to list.
        api_key: that callers must have.
        stall_s: without progress for longer than this the server does not call itself healthy.
    """

    listed = {"id": model, "object": "model", "owned_by": "wdmoe"}

    def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if api_key is not None and not compare_digest(given, api_key.encode()):
            raise HTTPException(401, "a valid API key is needed: Authorization: Bearer …")

    async def completions(request: Request) -> Response:
        check_key(request)
        asked = await _body(request, Completion)
        ids = tokenizer.encode(asked.prompt)
        return await _answer(server, request, asked, ids, _Shape("text_completion", model, len(ids)))

    async def chat(request: Request) -> Response:
        check_key(request)
        if not tokenizer.has_chat_template:
            raise HTTPException(400, "this model has no chat template: use /v1/completions")
        asked = await _body(request, Chat)
        try:
            ids = tokenizer.encode_chat(asked.conversation)
        except TemplateError as error:
            raise HTTPException(400, f"the model's chat template refuses these messages: {error}") from None
        return await _answer(server, request, asked, ids, _Shape("chat.completion", model, len(ids)))

    async def models(request: Request) -> Response:
        check_key(request)
        return JSONResponse({"object": "list", "data": [listed]})

    async def the_model(request: Request) -> Response:
        check_key(request)
        if request.path_params["id"] != model:
            raise HTTPException(404, f"there is one model, '{model}'")
        return JSONResponse(listed)

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
            Route("/v1/models/{id:path}", the_model),
            Route("/health", health),
        ],
        # Each handler takes its own kind of exception.
        exception_handlers={HTTPException: _http_error, Exception: _unforeseen},  # type: ignore[dict-item]
    )


class _Token(NamedTuple):
    """What a caller is told of a token; 58 KiB of records of its steps must not pile up for those who read slowly."""

    text: str
    finish: _Finish | None
    degraded: bool


class _Shape:
    """How one answer is written: completions and chat differ in names only."""

    def __init__(self, kind: Literal["text_completion", "chat.completion"], model: str, prompt_tokens: int) -> None:
        self._chat = kind == "chat.completion"
        self._head = {"id": f"wdmoe-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._kind = kind
        self._prompt_tokens = prompt_tokens

    def whole(self, made: list[_Token]) -> dict[str, Any]:
        text = "".join(token.text for token in made)
        content = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        return {**self._head, "object": self._kind, "choices": [_choice(content, made[-1])], **self._account(made)}

    def piece(self, token: _Token, *, first: bool = False) -> bytes:
        role = {"role": "assistant"} if first else {}
        content = {"delta": {**role, "content": token.text}} if self._chat else {"text": token.text}
        return self._chunk({"choices": [_choice(content, token)]})

    def account(self, made: list[_Token]) -> bytes:
        return self._chunk({"choices": [], **self._account(made)})

    def _chunk(self, content: dict[str, Any]) -> bytes:
        return _sse({**self._head, "object": f"{self._kind}.chunk" if self._chat else self._kind, **content})

    def _account(self, made: list[_Token]) -> dict[str, Any]:
        prompt, new = self._prompt_tokens, len(made)
        return {
            "usage": {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new},
            "wdmoe": {"degraded_tokens": sum(token.degraded for token in made)},
        }


def _choice(content: dict[str, Any], last: _Token) -> dict[str, Any]:
    return {"index": 0, **content, "finish_reason": last.finish}


async def _answer(server: AnswerServer, request: Request, asked: Options, ids: list[int], shape: _Shape) -> Response:
    if not ids:
        raise HTTPException(400, "the prompt has no tokens")
    tokens = _tokens(server, request, ids, asked)
    # What can't be answered shows before the first token, while there is a status line to say so.
    first = await anext(tokens)
    if asked.stream:
        stream = _stream(first, tokens, shape, usage=bool(asked.stream_options.include_usage))
        return StreamingResponse(stream, media_type="text/event-stream")
    return JSONResponse(shape.whole([first, *[token async for token in tokens]]))


async def _stream(first: _Token, rest: AsyncIterator[_Token], shape: _Shape, *, usage: bool) -> AsyncIterator[bytes]:
    made = [first]
    try:
        yield shape.piece(first, first=True)
        async for token in rest:
            made.append(token)
            yield shape.piece(token)
        if usage:
            yield shape.account(made)
    except HTTPException as error:
        # The status line has been sent: the error is the stream's last word.
        yield _sse(_error(error))
    yield b"data: [DONE]\n\n"


def _tokens(server: AnswerServer, request: Request, ids: list[int], asked: Options) -> AsyncIterator[_Token]:
    """Take a place: the answer's tokens as they come, the last of them with `finish`.

    Raises:
        HTTPException: there is no place; from the iterator: the answer failed, or the caller has hung up.
    """
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[list[_Token] | HTTPException] = asyncio.Queue()

    def deliver(news: StreamUpdate) -> None:
        what = _failure(news.error) if news.error else [_token(event) for event in news.events]
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is listening any more
            loop.call_soon_threadsafe(arrived.put_nowait, what)

    try:
        accepted = server.submit(ids, asked.sampling, deliver)
    except BusyError as error:
        raise HTTPException(429, str(error), {"Retry-After": f"{error.retry_after_s:.0f}"}) from None

    async def free_place() -> None:
        # ASGI says so when the caller hangs up, and after the response, when there is nothing left to cancel.
        while (await request.receive())["type"] != "http.disconnect":
            pass
        server.cancel(accepted)
        arrived.put_nowait(HTTPException(400, "the caller has hung up"))

    # Kept by the request: a task that nobody refers to may be collected.
    request.state.free_place = asyncio.create_task(free_place())

    async def tokens() -> AsyncIterator[_Token]:
        text = StopText(asked.stops)
        while True:
            news = await arrived.get()
            if isinstance(news, HTTPException):
                raise news
            for token in news:
                certain = text.push(token.text)
                if text.hit:
                    server.cancel(accepted)
                    yield _Token(certain, "stop", token.degraded)
                    return
                if token.finish:
                    yield token._replace(text=certain + text.rest())
                    return
                yield token._replace(text=certain)

    return tokens()


def _token(event: TokenEvent) -> _Token:
    degraded = any(layer.degraded for step in event.steps for layer in step.layers)
    return _Token(event.text, _FINISH[event.stop] if event.stop else None, degraded)


def _failure(error: WdmoeError) -> HTTPException:
    return HTTPException(400 if isinstance(error, ContextLengthError) else 503, str(error))


async def _body(request: Request, kind: type[_Asked]) -> _Asked:
    raw = b""
    try:
        async for part in request.stream():
            raw += part
            if len(raw) > MAX_BODY_BYTES:
                raise HTTPException(413, f"the request is longer than {MAX_BODY_BYTES} bytes")
        return parse_request(raw, kind)
    except ClientDisconnect:
        raise HTTPException(400, "the caller has hung up") from None
    except ValueError as error:
        raise HTTPException(400, f"not a request that can be answered: {error}") from None


def _sse(document: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(document) + b"\n\n"


def _error(error: HTTPException) -> dict[str, Any]:
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    return {"error": {"message": error.detail, "type": kind, "code": error.status_code}}


async def _http_error(request: Request, error: HTTPException) -> Response:
    return JSONResponse(_error(error), error.status_code, headers=error.headers)


async def _unforeseen(request: Request, error: Exception) -> Response:
    # Starlette raises it again behind this response, for uvicorn to log.
    return await _http_error(request, HTTPException(500, "this failed in a way that was not foreseen: see the log"))
