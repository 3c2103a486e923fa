"""What callers of the HTTP interface may ask for. Pure.

Source: the OpenAI API reference (completions, chat completions). `null` means the default, as there. An option that
would change the answer if it were ignored is refused by name, unless its value says that nothing is to be changed; so
is what is not known here.

Other than there, the default is greedy decoding (temperature 0) of at most 256 tokens.
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


_Stop = Annotated[str, Meta(min_length=1, max_length=256)]


class StreamOptions(Struct, forbid_unknown_fields=True):
    """How a stream is written.

    Attributes:
        include_usage: end it with a chunk that says how many tokens there were.
    """

    include_usage: bool | None = None


class Options(Struct, kw_only=True, forbid_unknown_fields=True):
    """What completions and chat have in common.

    Attributes:
        model: not looked at: there is one.
        max_completion_tokens: the newer name of `max_tokens`, which it overrides.
        seed: of what torch's generator takes, what fits into 64 bits with a sign; drawn anew for whoever says none, so
            that asking again gives another answer.
        stop: the answer ends before the first of these.
    """

    model: str = ""
    max_tokens: Annotated[int, Meta(ge=1)] = 256
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] = msgspec.field(default_factory=lambda: secrets.randbits(63))
    stop: _Stop | Annotated[list[_Stop], Meta(max_length=16)] = []
    stream: bool = False
    stream_options: StreamOptions = msgspec.field(default_factory=StreamOptions)

    @property
    def sampling(self) -> SamplingConfig:
        """How the answer's tokens are chosen."""
        tokens = self.max_completion_tokens or self.max_tokens
        return SamplingConfig(tokens, self.temperature, self.top_p, self.seed)

    @property
    def stops(self) -> list[str]:
        """Strings that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop


class Completion(Options, kw_only=True):
    """A text to continue."""

    prompt: Annotated[str, Meta(min_length=1)]


class _Text(Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    text: str


class _Message(Struct, forbid_unknown_fields=True):
    role: Literal["system", "user", "assistant"]
    content: str | list[_Text]
    # What clients send back of earlier answers, where there was nothing of it.
    annotations: Annotated[list[Any], Meta(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    refusal: None = None
    tool_calls: None = None


class Chat(Options, kw_only=True):
    """A conversation to go on with."""

    messages: Annotated[list[_Message], Meta(min_length=1)]

    @property
    def conversation(self) -> list[ChatMessage]:
        """The messages as chat templates want them."""
        return [
            {"role": m.role, "content": m.content if isinstance(m.content, str) else "".join(t.text for t in m.content)}
            for m in self.messages
        ]


_Asked = TypeVar("_Asked", bound=Options)


def parse_request(raw: bytes, kind: type[_Asked]) -> _Asked:
    """What a request's body asks for.

    Raises:
        ValueError: why it can't be answered, in one line.
    """
    try:
        told = msgspec.json.decode(raw, type=dict[str, Any])
        asked = {name: value for name, value in told.items() if value is not None and name not in _WITHOUT_EFFECT}
        for name in _NEUTRAL.keys() & asked.keys():
            if not _is_neutral(name, asked.pop(name)):
                raise ValueError(f"`{name}` is not implemented: leave it out")
        return msgspec.convert(asked, kind)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _is_neutral(name: str, value: object) -> bool:
    # To Python 0 is False, but `logprobs: 0` asks for something.
    return any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in _NEUTRAL[name])
