"""What heads are asked over HTTP; every wait has a deadline.

Any head gives answers, as streams of OpenAI-style chat completions. A base station also says how many experts it keeps.
"""

import json
import time
from collections.abc import Iterator, Mapping
from http.client import HTTPConnection, HTTPException
from typing import Any

from msgspec import Struct
from prometheus_client.parser import text_string_to_metric_families

from common.errors import one_line

_CONNECT_S = 5.0
_PART_BYTES = 65536
_LONGEST_WHY = 300


class AnswerEndedError(Exception):
    """An answer ended before its last token.

    Attributes:
        outcome: `refused`, `aborted` or `hung`.
    """

    def __init__(self, outcome: str, why: str) -> None:
        super().__init__(why)
        self.outcome = outcome


class Piece(Struct, frozen=True):
    """Text that arrived at once, usually a token.

    Attributes:
        at_s: when, after the request was sent.
    """

    at_s: float
    text: str


class Account(Struct):
    """What a head says about an answer at its end; fields that it leaves out stay None or 0.

    Attributes:
        tokens: of the answer.
        degraded_tokens: tokens for which experts were missing.
    """

    tokens: int | None = None
    prompt_tokens: int | None = None
    degraded_tokens: int = 0


def is_ready(port: int, path: str) -> bool:
    """Whether a head on this host answers a GET of `path` with status 200."""
    try:
        _get(port, path, _CONNECT_S)
    except (OSError, HTTPException, AnswerEndedError):
        return False
    return True


def local_experts(port: int, slices: int, *, deadline_s: float) -> tuple[int, int]:
    """How many experts a base station on this host keeps, and how many there are, by its metrics.

    Args:
        slices: of each expert.
        deadline_s: longest wait for the metrics.

    Raises:
        AnswerEndedError: the head does not serve these metrics.
    """
    try:
        text = _get(port, "/metrics", deadline_s).decode()
        found = {family.name: family.samples for family in text_string_to_metric_families(text)}
        local, every = (int(found[name][0].value) // slices for name in ("wdmoe_experts_local", "wdmoe_experts"))
    except TimeoutError:
        raise AnswerEndedError("hung", f"no metrics after {deadline_s:g} s") from None
    except (OSError, HTTPException) as error:
        raise AnswerEndedError("aborted", f"no metrics: {one_line(error)}") from None
    except (ValueError, LookupError):
        raise AnswerEndedError("refused", "its metrics don't say how many experts it keeps") from None
    return local, every


def chat_request(prompt: str, tokens: int, *, ignore_eos: bool = False) -> dict[str, Any]:
    """A greedy answer to one message. Caches of prompts are off, because the same prompt comes again on other links.

    Args:
        ignore_eos: the answer has exactly `tokens` tokens; distributed-llama does not know this option.
    """
    return {
        "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True}, "cache_prompt": False,
        **({"ignore_eos": True} if ignore_eos else {}),
    }  # fmt: skip


def stream_answer(port: int, request: Mapping[str, Any], account: Account, *, deadline_s: float) -> Iterator[Piece]:
    """Send a request to a head on this host, and yield the pieces of its answer as they arrive.

    Args:
        account: filled in with what the head says about the answer.
        deadline_s: longest wait for the next piece.

    Raises:
        AnswerEndedError: the head refused, broke the answer off, or was silent for longer than `deadline_s`.
    """
    connection = HTTPConnection("127.0.0.1", port, timeout=deadline_s)
    began_s = time.perf_counter()
    ended = False
    try:
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(request).encode(), {"Content-Type": "application/json"}
        )
        sock = connection.sock  # the connection forgets it where the head closes it after the response
        with connection.getresponse() as response:
            if response.status != 200:
                raise AnswerEndedError("refused", f"status {response.status}: {_one_line(response.read(_PART_BYTES))}")
            heard_s, rest, part = time.perf_counter(), b"", b" "
            while part:
                sock.settimeout(max(0.001, heard_s + deadline_s - time.perf_counter()))
                part = response.read1(_PART_BYTES)
                now_s = time.perf_counter()
                *lines, rest = (rest + part).split(b"\n")
                # One head ends its stream without a line break.
                for line in lines if part else [rest]:
                    text, last = _read(line, account)
                    ended = ended or last
                    if text:
                        heard_s = now_s
                        yield Piece(now_s - began_s, text)
    except TimeoutError:
        raise AnswerEndedError("hung", f"silent for {deadline_s:g} s") from None
    except (OSError, HTTPException) as error:
        raise AnswerEndedError("aborted", f"connection lost: {one_line(error)}") from None
    finally:
        connection.close()
    if not ended:
        raise AnswerEndedError("aborted", "the stream ended before the answer did")


def _get(port: int, path: str, timeout_s: float) -> bytes:
    """Body of a head's answer to a GET.

    Raises:
        AnswerEndedError: its status is not 200.
        OSError, HTTPException: there is no answer.
    """
    connection = HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        if response.status != 200:
            raise AnswerEndedError("refused", f"status {response.status}: {_one_line(response.read(_PART_BYTES))}")
        return response.read()
    finally:
        connection.close()


def _read(line: bytes, account: Account) -> tuple[str, bool]:
    """Text of a line of server-sent events, and whether the answer is complete.

    Raises:
        AnswerEndedError: the line reports an error, or is not one of a chat completion.
    """
    line = line.strip()
    if line == b"data: [DONE]":
        return "", True
    if not line.startswith((b"data:", b"error:")):
        return "", False
    try:
        event = json.loads(line.partition(b":")[2])
        if line.startswith(b"error:") or "error" in event:
            raise AnswerEndedError("aborted", _one_line(json.dumps(event.get("error", event)).encode()))
        usage = event.get("usage") or {}
        account.tokens = usage.get("completion_tokens", account.tokens)
        account.prompt_tokens = usage.get("prompt_tokens", account.prompt_tokens)
        account.degraded_tokens = event.get("wdmoe", {}).get("degraded_tokens", account.degraded_tokens)
        choice = event["choices"][0] if event["choices"] else {}
        return choice.get("delta", {}).get("content") or "", bool(choice.get("finish_reason"))
    except (ValueError, LookupError, AttributeError, TypeError):
        raise AnswerEndedError("aborted", f"not a chat completion: {_one_line(line)}") from None


def _one_line(text: bytes) -> str:
    return " ".join(text.decode(errors="replace").split())[:_LONGEST_WHY]
