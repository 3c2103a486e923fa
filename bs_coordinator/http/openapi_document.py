"""The OpenAPI document of the HTTP interface, made from the types that requests are checked with. Pure.

Source: OpenAPI Specification 3.1.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from bs_coordinator.http.neutral_options import WITHOUT_EFFECT
from bs_coordinator.http.openai_schema import Chat, Completion
from bs_coordinator.http.request_json import NEUTRAL_OPTIONS
from bs_coordinator.http.tokenizer_api import Detokenize, Tokenize
from wire import __version__

_ERRORS = {
    "400": "An option or a prompt is wrong; the message names it.",
    "401": "The API key is missing or wrong.",
    "404": "Another model is served.",
    "408": "The body took too long to arrive.",
    "413": "The body is too long.",
    "415": "The body is not of the type application/json.",
    "429": "Too many requests are waiting; Retry-After gives the time to wait.",
    "500": "This answer failed.",
    "503": "Experts or the broker were lost.",
}


_ANSWER: dict[str, Any] = {
    "description": "The answer, or with `stream` its chunks as server-sent events.",
    "content": {
        "application/json": {"schema": {"type": "object"}},
        "text/event-stream": {"schema": {"type": "string"}},
    },
}


def openapi_document(models: Sequence[str], *, needs_key: bool) -> dict[str, Any]:
    """The document.

    Args:
        models: names under which requests may ask for the model.
        needs_key: whether callers must send an API key.
    """
    bodies = (Chat, Completion, Tokenize, Detokenize)
    _, schemas = msgspec.json.schema_components(bodies, ref_template="#/components/schemas/{name}")
    for kind in (Chat, Completion):
        properties = schemas[kind.__name__]["properties"]
        properties["model"]["examples"] = list(models)
        # Values that ask for nothing are the only ones that these options may have.
        for name, values in NEUTRAL_OPTIONS[kind].items():
            properties[name] = {"enum": [*values, None]}
        properties |= {name: {} for name in sorted(WITHOUT_EFFECT)}
    schemas["Error"] = {
        "type": "object",
        "properties": {
            "error": {
                "type": "object",
                "properties": {
                    "message": {"type": "string"}, "type": {"type": "string"}, "code": {"type": "integer"},
                },
                "required": ["message", "type", "code"],
            },
        },
        "required": ["error"],
    }  # fmt: skip
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "WDMoE", "version": __version__, "summary": "Completions and chat as OpenAI's API has them."},
        "paths": {
            "/v1/completions": {"post": _post("Continue one or several prompts.", "Completion", _ANSWER)},
            "/v1/chat/completions": {"post": _post("Answer a conversation.", "Chat", _ANSWER)},
            "/tokenize": {"post": _post("The tokens of a text.", "Tokenize", _json("Their ids."))},
            "/detokenize": {"post": _post("The text of tokens.", "Detokenize", _json("The text, as `prompt`."))},
            "/tokenizer_info": {"get": {"summary": "The tokenizer.", "responses": {"200": _json("Its tokens.")}}},
            "/v1/models": {"get": {"summary": "The served model.", "responses": {"200": _json("A list of it.")}}},
            "/health": {
                "get": {
                    "summary": "Whether all experts and the broker can be reached, and answers make progress.",
                    "responses": {"200": _json("Yes."), "503": _json("No, with the reason.")},
                    "security": [],
                },
            },
        },
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }
    return document | ({"security": [{"key": []}]} if needs_key else {})


def _post(summary: str, schema: str, answer: dict[str, Any]) -> dict[str, Any]:
    body = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    failures = {status: {"description": text, "content": error} for status, text in _ERRORS.items()}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": body},
        "responses": {"200": answer, **failures},
    }


def _json(description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": {"type": "object"}}}}
