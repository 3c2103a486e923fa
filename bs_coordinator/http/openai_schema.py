"""What callers of the HTTP interface may ask for. Pure.

Source: the OpenAI API reference (completions, chat completions). As there, `null` means the default. Unknown options
are refused by name, and so are options that are not implemented, unless their value asks for nothing. Unlike there,
the default is greedy decoding (temperature 0) of at most 256 tokens.
"""

import secrets
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from bs_coordinator.config import SamplingConfig
from bs_coordinator.engine.tokenizer import ChatMessage

_WITHOUT_EFFECT = frozenset(
    {"metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"}
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
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
"""Options that are not implemented, with the values that ask for nothing."""

_DEFAULT = SamplingConfig()

_Stop = Annotated[str, Meta(min_length=1, max_length=256)]


class StreamOptions(Struct, forbid_unknown_fields=True):
    """Options of a stream.

    Attributes:
        include_usage: end the stream with a chunk that has the number of tokens.
    """

    include_usage: bool | None = None


class Options(Struct, kw_only=True, forbid_unknown_fields=True):
    """Options that completions and chat share.

    Attributes:
        model: ignored, because a server has one model.
        max_completion_tokens: the newer name of `max_tokens`, which it overrides.
        seed: a signed 64-bit number; without one each request draws its own, so that repeating a request gives another
            answer.
        stop: strings before the first of which the answer ends.
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
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop


class Completion(Options, kw_only=True):
    """Request for the continuation of a text."""

    prompt: Annotated[str, Meta(min_length=1)]


class _Text(Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    text: str


class _Message(Struct, forbid_unknown_fields=True):
    role: Literal["system", "user", "assistant"]
    content: str | list[_Text]
    # Fields of earlier answers that clients send back; only empty ones can be accepted.
    annotations: Annotated[list[Any], Meta(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    refusal: None = None
    tool_calls: None = None


class Chat(Options, kw_only=True):
    """Request for the next message of a conversation."""

    messages: Annotated[list[_Message], Meta(min_length=1)]

    @property
    def conversation(self) -> list[ChatMessage]:
        """The messages as chat templates take them."""
        return [
            {"role": m.role, "content": m.content if isinstance(m.content, str) else "".join(t.text for t in m.content)}
            for m in self.messages
        ]


_Options = TypeVar("_Options", bound=Options)


def parse_request(raw: bytes, kind: type[_Options]) -> _Options:
    """Decode and check a request's body.

    Raises:
        ValueError: one line that says why the request can't be answered.
    """
    try:
        sent = msgspec.json.decode(raw, type=dict[str, Any])
        wanted = {name: value for name, value in sent.items() if value is not None and name not in _WITHOUT_EFFECT}
        for name in _NEUTRAL.keys() & wanted.keys():
            if not _is_neutral(name, wanted.pop(name)):
                raise ValueError(f"`{name}` is not implemented: leave it out")
        return msgspec.convert(wanted, kind)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _is_neutral(name: str, value: object) -> bool:
    # To Python 0 is False, but `logprobs: 0` asks for something.
    return any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in _NEUTRAL[name])
