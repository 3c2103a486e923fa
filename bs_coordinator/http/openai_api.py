"""The HTTP interface: completions and chat for OpenAI's clients, and a health check that looks at nodes and progress.

Source: the OpenAI API reference (completions, chat completions, models). Starlette does routing and streaming.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from hmac import compare_digest
from typing import TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from bs_coordinator.config import SamplingConfig
from bs_coordinator.engine.tokenizer import Tokenizer
from bs_coordinator.errors import AnswerError, BusyError, ContextLengthError
from bs_coordinator.http.answer_server import AnswerServer
from bs_coordinator.http.metrics import CountResponses, MetricsSource, metrics_route
from bs_coordinator.http.openai_responses import (
    STREAM_END,
    ResponseFormat,
    ResponseKind,
    Token,
    error_document,
    server_sent_event,
)
from bs_coordinator.http.openai_schema import Chat, Completion, Options, parse_request
from bs_coordinator.http.prompts import PromptEncoder
from bs_coordinator.http.requests import StreamUpdate
from bs_coordinator.http.stop_strings import StopText
from bs_coordinator.page.feed import LiveFeed
from bs_coordinator.page.routes import page_routes
from common.errors import WdmoeError

MAX_BODY_BYTES = 1 << 20
_LOOPBACK_ORIGIN = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
_BODY_S = 30
"""A request's body has to arrive within this time."""

_Options = TypeVar("_Options", bound=Options)


def http_app(
    server: AnswerServer, tokenizer: Tokenizer, *, model: str, api_key: str | None, stall_s: float,
    max_positions: int = 1 << 20, hosts: Sequence[str] = ("*",), origin: str = "", live: LiveFeed | None = None,
    metrics: MetricsSource | None = None,
) -> Starlette:  # fmt: skip
    """The ASGI application.

    Args:
        model: name under which the model is listed.
        api_key: key that callers must send; None lets every caller in.
        stall_s: the health check fails when running answers have had no token for longer than this.
        max_positions: the model's context length in tokens: prompts that certainly exceed it are not tokenised.
        hosts: names that a request's Host header may have; `*` allows any.
        origin: of web pages that may call the server, besides those of this machine; empty for none.
        live: feed of the live page; None for no page.
        metrics: served at `/metrics`; None for none.
    """
    prompts = PromptEncoder(tokenizer, max_positions)
    listed = {"id": model, "object": "model", "created": int(time.time()), "owned_by": "wdmoe"}

    def check_key(request: Request) -> None:
        # The scheme's name is case-insensitive (RFC 9110, 11.1); some clients send the key without one.
        header = request.headers.get("authorization", "")
        scheme, _, rest = header.partition(" ")
        sent = rest.strip() if scheme.lower() == "bearer" else header
        if api_key is not None and not compare_digest(sent.encode(), api_key.encode()):
            raise HTTPException(
                401, "a valid API key is needed: Authorization: Bearer …", {"WWW-Authenticate": "Bearer"}
            )

    async def completions(request: Request) -> Response:
        check_key(request)
        options = await _read_options(request, Completion)
        return await answer(request, options, lambda: prompts.encode(options.text_or_ids), "text_completion")

    async def chat(request: Request) -> Response:
        check_key(request)
        if not tokenizer.has_chat_template:
            raise HTTPException(400, "this model has no chat template: use /v1/completions")
        options = await _read_options(request, Chat)
        return await answer(request, options, lambda: prompts.encode_chat(options.conversation), "chat.completion")

    async def answer(
        request: Request, options: Options, tokenise: Callable[[], Awaitable[list[int]]], kind: ResponseKind
    ) -> Response:
        text = StopText(options.stops, tokenizer.special_tokens)
        same_text = kind == "text_completion"
        ids, tokens = await _begin(server, request, options.sampling, tokenise, text, same_text=same_text)
        format = ResponseFormat(kind, model, len(ids))
        # A request that fails before its first token can still get a status of its own.
        first = await anext(tokens)
        if options.stream:
            stream = _stream(first, tokens, format, usage=options.stream_options.include_usage)
            return StreamingResponse(stream, media_type="text/event-stream")
        return JSONResponse(format.document([first, *[token async for token in tokens]]))

    async def list_models(request: Request) -> Response:
        check_key(request)
        return JSONResponse({"object": "list", "data": [listed]})

    async def show_model(request: Request) -> Response:
        check_key(request)
        if request.path_params["id"] != model:
            raise HTTPException(404, f"there is one model, '{model}'")
        return JSONResponse(listed)

    async def health(request: Request) -> Response:
        load = server.load()
        healthy = not load.lost and load.stalled_s <= stall_s
        state = {
            "status": "ok" if healthy else "failing",
            "requests": load.requests,
            "stalled_s": round(load.stalled_s, 1),
        }
        if load.lost:
            state["reason"] = load.lost
        return JSONResponse(state, 200 if healthy else 503)

    routes = [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/models", list_models),
        Route("/v1/models/{id:path}", show_model),
        Route("/health", health),
        *(page_routes(live, check_key) if live else []),
    ]
    counted = []
    if metrics is not None:
        routes.append(metrics_route(metrics, check_key))
        counted.append(Middleware(CountResponses, metrics, [route.path for route in routes]))
    return Starlette(
        routes=routes,
        middleware=[
            *counted,
            Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False),
            Middleware(
                CORSMiddleware,
                allow_origins=[origin] if origin else [],
                allow_origin_regex=_LOOPBACK_ORIGIN,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
            ),
        ],
        # Each handler takes its own kind of exception.
        exception_handlers={HTTPException: _http_error, Exception: _unexpected_error},  # type: ignore[dict-item]
    )


async def _stream(
    first: Token, rest: AsyncIterator[Token], format: ResponseFormat, *, usage: bool
) -> AsyncIterator[bytes]:
    tokens = [first]
    try:
        yield format.chunk(first, first=True)
        async for token in rest:
            tokens.append(token)
            yield format.chunk(token)
        if usage:
            yield format.usage_chunk(tokens)
    except HTTPException as error:
        # The status line has been sent: the error becomes the last event.
        yield server_sent_event(error_document(error.status_code, error.detail))
    yield STREAM_END


async def _begin(
    server: AnswerServer, request: Request, sampling: SamplingConfig, tokenise: Callable[[], Awaitable[list[int]]],
    text: StopText, *, same_text: bool,
) -> tuple[list[int], AsyncIterator[Token]]:  # fmt: skip
    """Take a place for a request, tokenise its prompt and start the answer.

    Returns:
        The prompt's token ids, and the answer's tokens as they come, the last of them with `finish`.

    Raises:
        HTTPException: the server is full, or the prompt can't be tokenised; from the iterator: the answer failed, or
            the caller has hung up.
    """
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[list[Token] | HTTPException] = asyncio.Queue()

    def deliver(update: StreamUpdate) -> None:
        item = _http_exception(update.error) if update.error else [Token.of(event) for event in update.events]
        with contextlib.suppress(RuntimeError):  # the loop is closed: the caller is gone
            loop.call_soon_threadsafe(arrived.put_nowait, item)

    try:
        accepted = server.accept(sampling, deliver, same_text=same_text)
    except BusyError as error:
        raise HTTPException(429, str(error), {"Retry-After": f"{error.retry_after_s:.0f}"}) from None

    async def cancel_on_disconnect() -> None:
        # ASGI sends this message when the caller hangs up, and after the response, when nothing is left to cancel.
        while (await request.receive())["type"] != "http.disconnect":
            pass
        server.cancel(accepted)
        arrived.put_nowait(HTTPException(400, "the caller has hung up"))

    # Referred to by the request, because a task without a reference may be garbage-collected.
    request.state.cancel_on_disconnect = asyncio.create_task(cancel_on_disconnect())

    try:
        ids = await tokenise()
    except BaseException:
        server.cancel(accepted)
        raise
    server.submit(accepted, ids)

    async def tokens() -> AsyncIterator[Token]:
        while True:
            item = await arrived.get()
            if isinstance(item, HTTPException):
                raise item
            for token in item:
                certain = text.push(token.text, token.id)
                if text.hit:
                    server.cancel(accepted)
                    yield Token(certain, "stop", token.degraded)
                    return
                if token.finish:
                    yield token._replace(text=certain + text.rest())
                    return
                yield token._replace(text=certain)

    return ids, tokens()


def _http_exception(error: WdmoeError) -> HTTPException:
    status = 400 if isinstance(error, ContextLengthError) else 500 if isinstance(error, AnswerError) else 503
    return HTTPException(status, str(error))


async def _read_options(request: Request, kind: type[_Options]) -> _Options:
    # Browsers send this type to another origin only after they have asked (CORS).
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "send the request with the header Content-Type: application/json")
    raw = bytearray()
    try:
        async with asyncio.timeout(_BODY_S):
            async for part in request.stream():
                raw += part
                if len(raw) > MAX_BODY_BYTES:
                    raise HTTPException(413, f"the request is longer than {MAX_BODY_BYTES} bytes")
        return parse_request(bytes(raw), kind)
    except TimeoutError:
        raise HTTPException(408, f"the request took longer than {_BODY_S} s to arrive") from None
    except ClientDisconnect:
        raise HTTPException(400, "the caller has hung up") from None
    except ValueError as error:
        raise HTTPException(400, f"not a request that can be answered: {error}") from None


async def _http_error(request: Request, error: HTTPException) -> Response:
    document = error_document(error.status_code, error.detail)
    return JSONResponse(document, error.status_code, headers=error.headers)


async def _unexpected_error(request: Request, error: Exception) -> Response:
    # Starlette raises the error again after this response, and uvicorn logs it.
    return await _http_error(request, HTTPException(500, "an unexpected error: see the server's log"))
