"""What callers of the HTTP interface may ask for. Pure.

Source: the OpenAI API reference (completions, chat completions). As there, `null` means the default. Unknown options
are refused by name, and so are options that are not implemented, unless their value asks for nothing. Unlike there,
the default is greedy decoding (temperature 0) of at most 256 tokens.
"""

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from bs_coordinator.config import SamplingConfig
from bs_coordinator.engine.tokenizer import ChatMessage

_WITHOUT_EFFECT = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""Options that never change an answer."""

_NEUTRAL: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_p": (0,),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_k": (0, -1),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
}
"""Options that are not implemented, with the values that ask for nothing."""

_NEUTRAL_IN_MESSAGE: dict[str, tuple[object, ...]] = {
    "annotations": ([],),
    "reasoning": ("",),
    "reasoning_content": ("",),
    "refusal": ("",),
    "tool_calls": ([],),
}
"""Fields of earlier answers, of this server or of another, that clients send back, with the values that are empty."""

_DEFAULT = SamplingConfig()

_Stop = Annotated[str, Meta(max_length=256)]
_TokenId = Annotated[int, Meta(ge=0)]


class StreamOptions(Struct, forbid_unknown_fields=True):
    """Options of a stream.

    Attributes:
        include_usage: end the stream with a chunk that has the number of tokens.
        include_obfuscation: without effect: chunks are never padded.
    """

    include_usage: bool = False
    include_obfuscation: bool = False


class Options(Struct, kw_only=True, forbid_unknown_fields=True):
    """Options that completions and chat share.

    Attributes:
        model: ignored, because a server has one model.
        max_completion_tokens: the newer name of `max_tokens`, which it overrides.
        seed: a signed 64-bit number; without one each request draws its own, so that repeating a request gives another
            answer.
        stop: strings before the first of which the answer ends; empty ones have no effect.
    """

    model: str = ""
    max_tokens: Annotated[int, Meta(ge=1)] = _DEFAULT.max_tokens
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] = _DEFAULT.temperature
    top_p: Annotated[float, Meta(gt=0, le=1)] = _DEFAULT.top_p
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] = msgspec.field(default_factory=lambda: secrets.randbits(63))
    stop: _Stop | Annotated[list[_Stop], Meta(max_length=16)] = []
    stream: bool = False
    stream_options: StreamOptions = msgspec.field(default_factory=StreamOptions)

    @property
    def sampling(self) -> SamplingConfig:
        """How to choose the answer's tokens."""
        tokens = self.max_completion_tokens or self.max_tokens
        return SamplingConfig(tokens, self.temperature, self.top_p, self.seed)

    @property
    def stops(self) -> list[str]:
        """`stop` as a list of strings that are not empty."""
        return [stop for stop in ([self.stop] if isinstance(self.stop, str) else self.stop) if stop]


class Completion(Options, kw_only=True):
    """Request for the continuation of a text.

    Attributes:
        prompt: a text or its token ids, or a list of one of them.
    """

    prompt: str | list[str | int | list[_TokenId]]

    def __post_init__(self) -> None:
        """Check the parts of `prompt` that its type leaves open.

        Raises:
            ValueError: there is no prompt, or more than one.
        """
        texts = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        numbers = [part for part in texts if isinstance(part, int)]
        if not texts or not all(part for part in texts if not isinstance(part, int)):
            raise ValueError("`prompt` is empty")
        if numbers and len(numbers) < len(texts):
            raise ValueError("`prompt` mixes token ids and texts: send either")
        if numbers and min(numbers) < 0:
            raise ValueError("`prompt` has a negative token id")
        if not numbers and len(texts) > 1:
            raise ValueError(f"`prompt` is a list of {len(texts)} prompts: send a request for each of them")

    @property
    def text_or_ids(self) -> str | list[int]:
        """The prompt: a text, or token ids of which the vocabulary may have none."""
        if isinstance(self.prompt, str):
            return self.prompt
        ids = [part for part in self.prompt if isinstance(part, int)]
        if ids:
            return ids
        (only,) = (part for part in self.prompt if not isinstance(part, int))
        return only


class _Text(Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    text: str
    cache_control: object = None


class _Message(Struct, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Text]
    name: str | None = None

    def for_template(self) -> ChatMessage:
        """The message as chat templates take it, which know `developer` by its older name."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": content}
        return message if self.name is None else {**message, "name": self.name}


class Chat(Options, kw_only=True):
    """Request for the next message of a conversation."""

    messages: Annotated[list[_Message], Meta(min_length=1)]

    @property
    def conversation(self) -> list[ChatMessage]:
        """The messages as chat templates take them."""
        return [message.for_template() for message in self.messages]


_Options = TypeVar("_Options", bound=Options)


def parse_request(raw: bytes, kind: type[_Options]) -> _Options:
    """Decode and check a request's body.

    Raises:
        ValueError: one line that says why the request can't be answered.
    """
    try:
        sent = msgspec.json.decode(raw, type=dict[str, Any])
        wanted = _normalised({name: value for name, value in sent.items() if name not in _WITHOUT_EFFECT})
        _drop_neutral(wanted, _NEUTRAL)
        messages = wanted.get("messages")
        for message in messages if isinstance(messages, list) else []:
            if isinstance(message, dict):
                _drop_neutral(message, _NEUTRAL_IN_MESSAGE)
        return msgspec.convert(wanted, kind)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _normalised(value: Any) -> Any:
    """A JSON value without fields that are null, and with whole numbers as integers: JSON has one kind of number."""
    if isinstance(value, dict):
        return {name: _normalised(field) for name, field in value.items() if field is not None}
    if isinstance(value, list):
        return [_normalised(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _drop_neutral(fields: dict[str, Any], neutral: Mapping[str, tuple[object, ...]]) -> None:
    for name in neutral.keys() & fields.keys():
        if not _is_one_of(fields.pop(name), neutral[name]):
            raise ValueError(f"`{name}` is not implemented: leave it out")


def _is_one_of(value: object, neutral: tuple[object, ...]) -> bool:
    # To Python 0 is False, but `logprobs: 0` asks for something.
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral)
