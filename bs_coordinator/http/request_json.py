"""Reading the body of a request: JSON as clients write it, with differences that have no meaning evened out. Pure.

Clients send fields that they leave empty, whole numbers with a point, and options that ask for nothing.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from bs_coordinator.http.neutral_options import NEUTRAL, NO_TOOLS, WITHOUT_EFFECT, asks_for_no_bias, drop_neutral
from bs_coordinator.http.openai_schema import Chat, Completion, Options

_MAPPINGS = ("audio", "chat_template_kwargs", "extra_body", "logit_bias", "reasoning", "stream_options", "wdmoe")
"""Options of which PHP writes the empty mapping as an empty list."""

_OWN_FIELDS = {"role", "content", "type", "text"}
"""Fields of messages and of parts of their contents of which an empty value is one, not the absence of one."""

_BOM = b"\xef\xbb\xbf"
_LONGEST_REASON = 300

NEUTRAL_OPTIONS: dict[type[Options], dict[str, tuple[object, ...]]] = {
    Completion: {**NEUTRAL, **NO_TOOLS, "top_logprobs": (0,)},
    Chat: {**NEUTRAL, "best_of": (1,), "echo": (False,)},
}
"""Each endpoint's options that are not implemented there, with the values that ask for nothing."""

_Options = TypeVar("_Options", bound=Options)
_Plain = TypeVar("_Plain")


def parse_request(raw: bytes, kind: type[_Options]) -> _Options:
    """Decode and check the body of a request for an answer.

    Raises:
        ValueError: one line that says why the request can't be answered.
    """
    return _parse(raw, lambda text: _wanted(text, kind))


def parse_plain(raw: bytes, kind: type[_Plain]) -> _Plain:
    """Decode and check the body of another request, whose options are all implemented.

    Raises:
        ValueError: one line that says why the request can't be answered.
    """
    return _parse(raw, lambda text: msgspec.convert(_normalised(msgspec.json.decode(text)), kind))


def _parse(raw: bytes, read: Callable[[str], _Plain]) -> _Plain:
    """Read JSON in UTF-8, which may begin with a byte order mark."""
    try:
        text = raw.removeprefix(_BOM).decode()
        if "\0" in text:
            raise ValueError("it is not text in UTF-8")  # but in UTF-16: JSON has no such character
        return read(text)
    except UnicodeDecodeError:
        raise ValueError("it is not text in UTF-8") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:  # msgspec repeats names of fields as they are
        reason = "".join(c if c.isprintable() else " " for c in str(error))
        raise ValueError(" ".join(reason.split())[:_LONGEST_REASON]) from None


def _wanted(text: str, kind: type[_Options]) -> _Options:
    sent = msgspec.json.decode(text, type=dict[str, Any])
    wanted = _normalised({name: value for name, value in sent.items() if name not in WITHOUT_EFFECT})
    wanted |= {name: {} for name in _MAPPINGS if wanted.get(name) == []}
    if asks_for_no_bias(wanted.get("logit_bias")):
        del wanted["logit_bias"]
    drop_neutral(wanted, NEUTRAL_OPTIONS[kind])
    if kind is Completion and wanted.get("logprobs") is False:
        del wanted["logprobs"]  # as chat writes that none are wanted
    if isinstance(wanted.get("stop"), list):
        wanted["stop"] = [stop for stop in wanted["stop"] if stop is not None]
    if isinstance(wanted.get("messages"), list):
        wanted["messages"] = [_without_empty_fields(message) for message in wanted["messages"]]
    return msgspec.convert(wanted, kind)


def _normalised(value: Any) -> Any:
    """A JSON value without fields that are null, and with whole numbers as integers: JSON has one kind of number."""
    if isinstance(value, dict):
        return {name: _normalised(field) for name, field in value.items() if field is not None}
    if isinstance(value, list):
        return [_normalised(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _without_empty_fields(message: Any) -> Any:
    """A message, or a part of its content, without fields that are empty.

    Clients send earlier answers back with all the fields that this server or another one gave them. Such an answer may
    have had no content.
    """
    if not isinstance(message, dict):
        return message
    kept = {name: value for name, value in message.items() if name in _OWN_FIELDS or value not in ("", [], {}, False)}
    if isinstance(kept.get("content"), list):
        kept["content"] = [_without_empty_fields(part) for part in kept["content"]]
    return {"content": "", **kept} if kept.get("role") == "assistant" else kept
