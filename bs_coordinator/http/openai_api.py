"""The HTTP interface: completions and chat for OpenAI's clients, and a health check that looks at nodes and progress.

Source: the OpenAI API reference (completions, chat completions, models). Starlette does routing and streaming.
"""

import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from bs_coordinator.engine.tokenizer import Tokenizer
from bs_coordinator.http.access import ApiKey
from bs_coordinator.http.answer_server import AnswerServer
from bs_coordinator.http.api_keys import KeyRing
from bs_coordinator.http.bodies import read_body
from bs_coordinator.http.choices import Choice, Choices
from bs_coordinator.http.metrics import CountResponses, MetricsSource, metrics_route
from bs_coordinator.http.openai_responses import (
    STREAM_END,
    Prompt,
    ResponseFormat,
    ResponseKind,
    Token,
    comment,
    error_document,
    server_sent_event,
)
from bs_coordinator.http.openai_schema import Chat, Completion, Options
from bs_coordinator.http.openapi_document import openapi_document
from bs_coordinator.http.prompts import PromptEncoder
from bs_coordinator.http.request_json import parse_request
from bs_coordinator.http.request_log import LogLine, RequestTracking, TrackedRequest
from bs_coordinator.http.request_policy import NamedPolicy, RequestPolicies
from bs_coordinator.http.stop_strings import StopText
from bs_coordinator.http.tokenizer_api import Detokenize, Tokenize, tokenizer_routes
from bs_coordinator.page.feed import LiveFeed
from bs_coordinator.page.routes import page_routes
from common.clock import SYSTEM_CLOCK, Clock

ANY_MODEL = "wdmoe"
"""Name of whichever model is served."""
_LOOPBACK_ORIGIN = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
_KEEP_ALIVE_S = 10.0
"""Proxies and clients commonly give up after 30 to 60 s without a byte."""

_Body = TypeVar("_Body", bound=Options | Tokenize | Detokenize)


def http_app(
    server: AnswerServer, tokenizer: Tokenizer, *, model: str, stall_s: float,
    max_positions: int = 1 << 20, hosts: Sequence[str] = ("*",), origin: str = "", live: LiveFeed | None = None,
    metrics: MetricsSource | None = None, keys: Sequence[ApiKey] = (),
    model_aliases: Sequence[str] = (), about: Mapping[str, str] | None = None, log_request: LogLine | None = None,
    keep_alive_s: float = _KEEP_ALIVE_S, clock: Clock = SYSTEM_CLOCK, policies: RequestPolicies | None = None,
) -> Starlette:  # fmt: skip
    """The ASGI application.

    Args:
        model: name under which the model is listed.
        stall_s: the health check fails when running answers have had no token for longer than this.
        max_positions: the model's context length in tokens: prompts that certainly exceed it are not tokenised.
        hosts: names that a request's Host header may have; `*` allows any.
        origin: of web pages that may call the server, besides those of this machine; empty for none.
        live: feed of the live page; None for no page.
        metrics: served at `/metrics`; None for none.
        keys: of which callers must send one; without any every caller is let in.
        model_aliases: further names of the model in requests.
        about: how the base station is configured, for the field `wdmoe` of responses.
        log_request: called with a line for each POST request when it is over.
        keep_alive_s: a stream without a token for so long gets a comment line.
        clock: for times of requests.
        policies: that requests may name; None if they may not.
    """
    prompts = PromptEncoder(tokenizer, max_positions)
    listed = {"id": model, "object": "model", "created": int(time.time()), "owned_by": "wdmoe"}
    ring = KeyRing(keys)
    names = {"", model, ANY_MODEL, *model_aliases}

    def check_key(request: Request) -> None:
        ring.check(request.headers.get("authorization", ""))

    async def read(request: Request, parse: Callable[[bytes], _Body]) -> _Body:
        """The options of a request that may be answered."""
        tracked = _tracked(request)
        tracked.key = ring.check(request.headers.get("authorization", ""))
        options = await read_body(request, parse)
        if options.model not in names:
            raise HTTPException(404, f"the model '{options.model}' is not served here: use '{model}' or '{ANY_MODEL}'")
        ring.enter(tracked.key)
        tracked.at_end.append(lambda: ring.leave(tracked.key))
        return options

    async def completions(request: Request) -> Response:
        options = await read(request, lambda raw: parse_request(raw, Completion))
        texts = options.prompts

        async def tokenise() -> list[list[int]]:
            return [await prompts.encode(text) for text in texts]

        def echoed(ids: Sequence[list[int]]) -> list[Prompt]:
            spelt = (
                Prompt(text if isinstance(text, str) else tokenizer.decode(some), some[0])
                for text, some in zip(texts, ids, strict=True)
            )
            return [prompt for prompt in spelt for _ in range(options.n)] if options.echo else []

        return await answer(request, options, len(texts), tokenise, echoed, "text_completion")

    async def chat(request: Request) -> Response:
        options = await read(request, lambda raw: parse_request(raw, Chat))
        if not tokenizer.has_chat_template:
            raise HTTPException(400, "this model has no chat template: use /v1/completions")

        async def tokenise() -> list[list[int]]:
            return [await prompts.encode_chat(options.conversation)]

        return await answer(request, options, 1, tokenise, lambda ids: [], "chat.completion")

    async def answer(
        request: Request, options: Options, count: int, tokenise: Callable[[], Awaitable[list[list[int]]]],
        echoed: Callable[[Sequence[list[int]]], list[Prompt]], kind: ResponseKind,
    ) -> Response:  # fmt: skip
        tracked = _tracked(request)
        named = _named_policy(options, policies)
        chosen_by = {"policy": named.name, "draft": "none"} if named else {}
        policy = named.policy if named else None
        choices = Choices(
            server, request, [
                Choice(i, sampling, policy, options.wdmoe.timings)
                for i in range(count) for sampling in options.samplings
            ],
            lambda: StopText(options.stops, tokenizer.special_tokens),
            same_text=kind == "text_completion", keep_alive_s=keep_alive_s,
            on_hang_up=tracked.hung_up,
        )  # fmt: skip
        tracked.stream, tracked.choices = options.stream, count * options.n
        ids = await choices.start(tokenise)
        tracked.tally.prompt_tokens = sum(map(len, ids))
        format = ResponseFormat(
            kind, tracked.id, model, tracked.tally, tokenizer.token_bytes,
            about={**(about or {}), **chosen_by, **({"ignored": options.ignored} if options.ignored else {})},
            logprobs=options.top is not None, echoed=echoed(ids),
            usage_in_chunks=options.stream_options.continuous_usage_stats,
        )  # fmt: skip
        tokens = _counted(choices.tokens(), tracked, none=options.most_tokens == 0)
        # A request that fails before its first token can still get a status of its own.
        first = await anext(tokens)
        headers = {"X-Request-Id": tracked.id}
        if options.stream:
            stream = _stream(first, tokens, format, choices, tracked, usage=options.stream_options.include_usage)
            return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
        by_choice: dict[int, list[Token]] = defaultdict(list)
        for index, token in [item async for item in _chain(first, tokens) if item is not None]:
            by_choice[index].append(token)
        return JSONResponse(format.document(by_choice), headers=headers)

    async def list_models(request: Request) -> Response:
        check_key(request)
        return JSONResponse({"object": "list", "data": [listed]})

    async def show_model(request: Request) -> Response:
        check_key(request)
        wanted = request.path_params["id"]
        if wanted not in names:
            raise HTTPException(404, f"there is one model, '{model}'")
        return JSONResponse(listed) if wanted else await list_models(request)

    async def openapi(request: Request) -> Response:
        return JSONResponse(openapi_document(sorted(names - {""}), needs_key=ring.needed))

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
        Route("/openapi.json", openapi),
        *tokenizer_routes(tokenizer, prompts, max_positions=max_positions, read=read, check_key=check_key),
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
            Middleware(RequestTracking, clock=clock, write=log_request),
            Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False),
            Middleware(
                CORSMiddleware,
                allow_origins=[origin] if origin else [],
                allow_origin_regex=_LOOPBACK_ORIGIN,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                allow_private_network=True,  # browsers ask for it where the page comes from another network
            ),
        ],
        # Each handler takes its own kind of exception.
        exception_handlers={HTTPException: _http_error, Exception: _unexpected_error},  # type: ignore[dict-item]
    )


_Item = tuple[int, Token] | None
"""The next token of a choice, or None as a sign of life."""


def _named_policy(options: Options, policies: RequestPolicies | None) -> NamedPolicy | None:
    """The policy that a request names; None if it leaves the choice to the base station."""
    text = options.wdmoe.policy
    if text is None:
        return None
    if policies is None:
        raise HTTPException(400, "`wdmoe.policy`: this server has one policy: leave it out")
    try:
        return policies.find(text)
    except ValueError as error:
        raise HTTPException(400, f"`wdmoe.policy`: {error}") from None


def _tracked(request: Request) -> TrackedRequest:
    tracked: TrackedRequest = request.state.tracked
    return tracked


async def _counted(items: AsyncIterator[_Item], tracked: TrackedRequest, *, none: bool) -> AsyncIterator[_Item]:
    """The items, counted.

    Args:
        none: no token was asked for, only the scores of the prompt's: the one that comes with them is left out.
    """
    async for item in items:
        if item is None:
            yield None
        elif none:
            index, token = item
            yield index, token._replace(text="", finish="length", logprob=None)
        else:
            tracked.tally.add(*item)
            yield item


async def _chain(first: _Item, rest: AsyncIterator[_Item]) -> AsyncIterator[_Item]:
    yield first
    async for item in rest:
        yield item


async def _stream(
    first: _Item, rest: AsyncIterator[_Item], format: ResponseFormat, choices: Choices, tracked: TrackedRequest, *,
    usage: bool,
) -> AsyncIterator[bytes]:  # fmt: skip
    try:
        async for item in _chain(first, rest):
            if item is None:
                ahead = choices.ahead
                yield comment(f"waiting, {ahead} requests ahead" if ahead else "waiting")
            else:
                yield format.chunk(*item)
        if usage:
            yield format.usage_chunk()
    except HTTPException as error:
        # The status line has been sent: the error becomes the last event.
        tracked.fail(error.status_code)
        yield server_sent_event(error_document(error.status_code, error.detail))
    yield STREAM_END


async def _http_error(request: Request, error: HTTPException) -> Response:
    document = error_document(error.status_code, error.detail)
    return JSONResponse(document, error.status_code, headers=error.headers)


async def _unexpected_error(request: Request, error: Exception) -> Response:
    # Starlette raises the error again after this response, and uvicorn logs it.
    return await _http_error(request, HTTPException(500, "an unexpected error: see the server's log"))
