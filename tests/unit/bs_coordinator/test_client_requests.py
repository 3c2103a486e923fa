"""Requests as other programs send them, and the table of them in docs/http.md.

The bodies were recorded from the clients, with shorter texts; those of Open WebUI, vLLM and lm-evaluation-harness are
written as their source builds them.
"""

from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from bs_coordinator.http.openai_schema import Chat, Completion, Options
from bs_coordinator.http.request_json import parse_request

ROOT = Path(__file__).parents[3]
CHECKS = ("chat", "completions", "stream", "stop", "seed", "logprobs", "n")
USER: Any = {"role": "user", "content": "What is the capital of France?"}


class Sent(NamedTuple):
    """A client and requests that it sent.

    Attributes:
        name, version: of the client.
        chats, completions: bodies for `/v1/chat/completions` and `/v1/completions`.
    """

    name: str
    version: str
    chats: tuple[dict[str, Any], ...] = ()
    completions: tuple[dict[str, Any], ...] = ()


_TURN = {"messages": [USER], "max_tokens": 8}
_USAGE = {"stream": True, "stream_options": {"include_usage": True}}
_LOAD = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}, "ignore_eos": True}
_NPM_PROMPT = "user:\nWhat is the capital of France?\n\nassistant:\n"
_WEBUI_TOOLS: Any = [  # two of those that it adds itself
    {"type": "function", "function": {
        "name": "get_current_timestamp", "description": "Get the current Unix timestamp in seconds.",
        "parameters": {"properties": {}, "type": "object"}}},
    {"type": "function", "function": {
        "name": "search_web", "description": "Search the public web for information.",
        "parameters": {"properties": {"query": {"type": "string", "description": "What to look for"}},
                       "required": ["query"], "type": "object"}}},
]  # fmt: skip
_NO_PENALTIES = {"frequency_penalty": 0, "presence_penalty": 0, "top_p": 1}

CLIENTS = (
    Sent(
        "`openai` (Python)",
        "3.57.0",
        (
            {**_TURN, **_USAGE},
            {**_TURN, "stop": "ere", "seed": 7, "temperature": 1},
            {**_TURN, "logprobs": True, "n": 2, "temperature": 1, "top_logprobs": 2},
        ),
        ({"prompt": ["a b", "c"], "echo": True, "logprobs": 1, "max_tokens": 3},),
    ),
    Sent(
        "`openai` (npm)",
        "6.49.0",
        (
            {**_TURN, "stream": True},
            {**_TURN, "stop": ["zz"], "seed": 3, "temperature": 1, "n": 2, "logprobs": True, "top_logprobs": 1},
        ),
    ),
    Sent(
        "`litellm`",
        "1.110.2",
        (
            {**_TURN, **_USAGE},
            {**_TURN, "temperature": 1, "stop": ["zzz"], "seed": 3},
            {**_TURN, "n": 2, "logprobs": True, "top_logprobs": 1},
        ),
        ({"stream": True, "prompt": "Hello", "max_tokens": 5},),
    ),
    Sent(
        "`llm`",
        "0.36",
        (
            {**_USAGE, "messages": [{"role": "system", "content": "Be brief"}, USER], "max_tokens": 8, "seed": 3,
             "stop": "zz", "temperature": 1.0},
            {"stream": False, "messages": [USER]},
        ),
        ({**_USAGE, "prompt": "Hello", "logprobs": 2, "max_tokens": 8},),
    ),
    Sent(
        "`langchain-openai`",
        "1.7.4",
        (
            {**_USAGE, "messages": [USER], "max_completion_tokens": 8},
            {"stream": False, "messages": [USER], "logprobs": True, "max_completion_tokens": 8, "n": 2, "seed": 4,
             "stop": ["zz"], "temperature": 1.0, "top_logprobs": 2},
            {"stream": False, "messages": [{"role": "system", "content": "Be brief"}, {**USER, "name": "ada"},
             {"role": "assistant", "content": "Paris"},
             {"role": "user", "content": [{"type": "text", "text": "So?"}]}]},
        ),
        (
            {**_NO_PENALTIES, "prompt": ["Hello"], "logprobs": None, "max_tokens": 8, "n": 1, "seed": None,
             "temperature": 0.7},
            {**_NO_PENALTIES, "prompt": ["a", "b"], "best_of": 2, "logprobs": 1, "max_tokens": 8, "n": 2, "seed": 1,
             "stop": ["zz"], "temperature": 0.7},
        ),
    ),
    Sent(
        "`ai` (`@ai-sdk/openai`)",
        "6.0.326",
        (
            {**_TURN, **_USAGE},
            {**_TURN, "temperature": 0.5, "stop": ["zz"], "seed": 2},
            {**_TURN, "logprobs": True, "top_logprobs": 2},
        ),
        ({"max_tokens": 8, "temperature": 0.5, "seed": 2, "prompt": _NPM_PROMPT, "stop": ["\nuser:", "zz"]},),
    ),
    Sent(
        "Open WebUI",
        "0.12.4",
        (
            {**_TURN, **_USAGE},
            {**_USAGE, "messages": [USER], "temperature": 0.8, "top_p": 0.9, "min_p": 0.0, "top_k": -1,
             "max_tokens": 8, "frequency_penalty": 0.0, "presence_penalty": 0.0, "repeat_penalty": 1.0, "seed": 1,
             "stop": ["zz"], "logit_bias": {}},
            {"messages": [USER], "stream": False, "max_tokens": 1000},
            {**_USAGE, "messages": [USER], "tools": _WEBUI_TOOLS},
        ),
    ),
    Sent(
        "`guidellm`",
        "0.8.1",
        ({**_LOAD, "max_completion_tokens": 4, "messages": [{"role": "user", "content": [
            {"type": "text", "text": "1 0 m"}]}]},),
        ({**_LOAD, "max_tokens": 4, "prompt": "1 0 m"},),
    ),
    Sent(
        "`vllm bench serve`",
        "0.33.0",
        ({**_USAGE, "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
          "max_completion_tokens": 8, "ignore_eos": True, "temperature": 0.0},),
        ({**_USAGE, "prompt": [1, 2, 3], "repetition_penalty": 1.0, "max_tokens": 8, "logprobs": None,
          "ignore_eos": True, "temperature": 0.0, "top_k": -1, "min_p": 0.0},),
    ),
    Sent(
        "lm-evaluation-harness",
        "0.4.13",
        (),
        (
            {"prompt": [[1, 2], [3]], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True},
            {"prompt": [[1, 2]], "max_tokens": 16, "temperature": 0, "stop": ["\n"], "seed": 1234},
        ),
    ),
)  # fmt: skip


def _requests(sent: Sent) -> list[Options]:
    bodies = [(body, Chat) for body in sent.chats] + [(body, Completion) for body in sent.completions]
    return [parse_request(msgspec.json.encode({"model": "wdmoe", **body}), kind) for body, kind in bodies]


def _done(sent: Sent) -> dict[str, bool]:
    """Which of `CHECKS` the requests ask for, as the server understands them."""
    requests = _requests(sent)
    return {
        "chat": bool(sent.chats),
        "completions": bool(sent.completions),
        "stream": any(request.stream for request in requests),
        "stop": any(request.stops for request in requests),
        "seed": any(request.seed is not None for request in requests),
        "logprobs": any(request.top is not None for request in requests),
        "n": any(request.n > 1 for request in requests),
    }


@pytest.mark.parametrize("sent", CLIENTS, ids=lambda sent: sent.name)
def test_what_clients_send_is_understood(sent: Sent) -> None:
    for body, request in zip([*sent.chats, *sent.completions], _requests(sent), strict=True):
        stop = body.get("stop", [])
        assert request.stops == ([stop] if isinstance(stop, str) else stop)
        assert request.seed == body.get("seed")
        assert (request.n, request.stream) == (body.get("n", 1), body.get("stream", False))
        assert request.most_tokens == body.get("max_completion_tokens", body.get("max_tokens", 256))
        assert (request.top is not None) == (body.get("logprobs") not in (None, False))
        assert request.ignore_eos == body.get("ignore_eos", False)


def test_the_documented_table_of_clients_is_what_they_send() -> None:
    rows = [f"| client | version | {' | '.join(CHECKS)} |", f"|---|---|{'---|' * len(CHECKS)}"]
    for sent in CLIENTS:
        cells = ["yes" if done else "" for done in _done(sent).values()]
        rows.append(" ".join(f"| {cell}" if cell else "|" for cell in [sent.name, sent.version, *cells]) + " |")
    table = "\n".join(rows)
    assert table in (ROOT / "docs" / "http.md").read_text(encoding="utf-8"), f"docs/http.md needs the table\n{table}"
