"""The model's tokenizer over HTTP, as vLLM's server offers it: lm-evaluation-harness needs no tokenizer of its own.

Source: vLLM's documentation of its server (tokenizer API); lm-evaluation-harness 0.4.13, `lm_eval.utils`.
"""

from collections.abc import Awaitable, Callable
from typing import Annotated, Protocol, TypeVar

from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bs_coordinator.engine.tokenizer import Tokenizer
from bs_coordinator.http.prompts import PromptEncoder
from bs_coordinator.http.request_json import parse_plain


class Tokenize(Struct, forbid_unknown_fields=True):
    """Request for the token ids of a text.

    Attributes:
        prompt: the text.
        model: name of the served model; empty for whichever it is.
        add_special_tokens: with the special tokens that the tokenizer puts around a text.
    """

    prompt: str
    model: str = ""
    add_special_tokens: bool = True


class Detokenize(Struct, forbid_unknown_fields=True):
    """Request for the text of tokens.

    Attributes:
        tokens: their ids.
        model: name of the served model; empty for whichever it is.
    """

    tokens: list[Annotated[int, Meta(ge=0)]]
    model: str = ""


_Body = TypeVar("_Body", Tokenize, Detokenize)


class _Read(Protocol):
    def __call__(self, request: Request, parse: Callable[[bytes], _Body]) -> Awaitable[_Body]: ...


def tokenizer_routes(
    tokenizer: Tokenizer, prompts: PromptEncoder, *, max_positions: int, read: _Read,
    check_key: Callable[[Request], object],
) -> list[Route]:  # fmt: skip
    """The paths `/tokenizer_info`, `/tokenize` and `/detokenize`.

    Args:
        prompts: tokenises in threads.
        max_positions: the model's context length in tokens.
        read: the body of a request that may be answered.
        check_key: lets callers in.
    """

    async def info(request: Request) -> Response:
        check_key(request)
        return JSONResponse({**tokenizer.description, "model_max_length": max_positions})

    async def tokenize(request: Request) -> Response:
        wanted = await read(request, lambda raw: parse_plain(raw, Tokenize))
        begin = wanted.add_special_tokens
        # An empty text is none that could be answered, but it has tokens, or none.
        ids = await prompts.encode(wanted.prompt, begin=begin) if wanted.prompt else tokenizer.encode("", begin=begin)
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": max_positions})

    async def detokenize(request: Request) -> Response:
        wanted = await read(request, lambda raw: parse_plain(raw, Detokenize))
        return JSONResponse({"prompt": await prompts.decode(wanted.tokens)})

    return [
        Route("/tokenizer_info", info),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
    ]
