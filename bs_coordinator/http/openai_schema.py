"""What callers of the HTTP interface may ask for. Pure.

Source: the OpenAI API reference (completions, chat completions). As there, `null` means the default. Unknown options
are refused by name, and so are options that are not implemented, unless their value asks for nothing. Unlike there,
the default is greedy decoding (temperature 0) of at most 256 tokens.
"""

import secrets
from dataclasses import replace
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from bs_coordinator.config import SamplingConfig
from bs_coordinator.engine.tokenizer import ChatMessage

MOST_CHOICES = 256
"""Choices of one request, for all its prompts together."""
MOST_TOP_LOGPROBS = 20

_DEFAULT = SamplingConfig()

_Stop = Annotated[str, Meta(max_length=256)]
_TokenId = Annotated[int, Meta(ge=0)]
_Top = Annotated[int, Meta(ge=0, le=MOST_TOP_LOGPROBS)]


class StreamOptions(Struct, forbid_unknown_fields=True):
    """Options of a stream.

    Attributes:
        include_usage: end the stream with a chunk that has the number of tokens.
        continuous_usage_stats: every chunk has the number of tokens so far.
        include_obfuscation: without effect: chunks are never padded.
    """

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class OwnOptions(Struct, forbid_unknown_fields=True):
    """Options that only this server has.

    Attributes:
        policy: how experts are chosen for this request, as `--policy` of `wdmoe-bs serve`; the base station's own if
            not set. Nothing is drafted for a request that names one.
        timings: each chunk of a stream has the token's id, and the parts of the time of its steps.
    """

    policy: Annotated[str, Meta(max_length=256)] | None = None
    timings: bool = False


class Options(Struct, kw_only=True, forbid_unknown_fields=True):
    """Options that completions and chat share.

    Attributes:
        model: name of the served model; empty for whichever it is.
        n: choices for each prompt.
        max_completion_tokens: the newer name of `max_tokens`, which it overrides.
        min_tokens: no end token is chosen before so many tokens.
        ignore_eos: end tokens do not end the answer.
        seed: a signed 64-bit number; without one each request draws its own, so that repeating a request gives another
            answer. The choices of a prompt have consecutive seeds.
        stop: strings before the first of which the answer ends; empty ones have no effect.
        wdmoe: options that only this server has.
    """

    model: str = ""
    n: Annotated[int, Meta(ge=1, le=128)] = 1
    max_tokens: Annotated[int, Meta(ge=0)] = _DEFAULT.max_tokens
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    min_tokens: Annotated[int, Meta(ge=0)] = 0
    ignore_eos: bool = False
    temperature: Annotated[float, Meta(ge=0, le=2)] = _DEFAULT.temperature
    top_p: Annotated[float, Meta(gt=0, le=1)] = _DEFAULT.top_p
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: _Stop | Annotated[list[_Stop], Meta(max_length=16)] = []
    stream: bool = False
    stream_options: StreamOptions = msgspec.field(default_factory=StreamOptions)
    wdmoe: OwnOptions = msgspec.field(default_factory=OwnOptions)

    @property
    def most_tokens(self) -> int:
        """New tokens at most; 0 to score the prompt only."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def top(self) -> int | None:
        """How many of the most probable tokens to name for each token; None without log-probabilities."""
        return None

    @property
    def whole(self) -> bool:
        """Whether the prompt is a part of the answer."""
        return False

    @property
    def ignored(self) -> list[str]:
        """Options that the answer does without, though they ask for something."""
        return []

    @property
    def sampling(self) -> SamplingConfig:
        """How to choose the tokens of a prompt's first choice."""
        return SamplingConfig(
            max_tokens=max(1, self.most_tokens),  # the step that scores a prompt yields one token more at no cost
            temperature=self.temperature,
            top_p=self.top_p,
            seed=secrets.randbits(63) if self.seed is None else self.seed,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            logprobs=self.top,
            prompt_logprobs=self.whole and self.top is not None,
        )

    @property
    def samplings(self) -> list[SamplingConfig]:
        """How to choose the tokens of each choice of a prompt."""
        first = self.sampling
        return [replace(first, seed=first.seed + i) for i in range(self.n)]

    @property
    def stops(self) -> list[str]:
        """`stop` as a list of strings that are not empty."""
        return [stop for stop in ([self.stop] if isinstance(self.stop, str) else self.stop) if stop]

    def check(self, prompts: int) -> None:
        """Refuse what the fields' types allow but their combination does not.

        Raises:
            ValueError: says which option has to be another.
        """
        if self.most_tokens == 0 and not self.whole:
            raise ValueError("`max_tokens` is 0, which only `echo` allows: ask for at least 1")
        if self.min_tokens > self.most_tokens:
            raise ValueError(f"`min_tokens` is {self.min_tokens}, above `max_tokens`, {self.most_tokens}")
        if prompts * self.n > MOST_CHOICES:
            raise ValueError(f"{prompts} prompts with `n` {self.n}: one request has at most {MOST_CHOICES} choices")


class Completion(Options, kw_only=True):
    """Request for the continuation of a text, or of several.

    Attributes:
        prompt: a text or its token ids, or a list of several of either.
        echo: begin the answer with the prompt.
        logprobs: give the log-probability of each token, and those of so many of the most probable tokens.
        best_of: how many choices to select `n` from; only `n` itself is implemented.
    """

    prompt: str | list[str | int | list[_TokenId]]
    echo: bool = False
    logprobs: _Top | None = None
    best_of: int | None = None

    def __post_init__(self) -> None:
        """Check what the types leave open.

        Raises:
            ValueError: a prompt is empty or the prompts are of several kinds, or options contradict each other.
        """
        texts = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        numbers = [part for part in texts if isinstance(part, int)]
        if not texts or not all(part for part in texts if not isinstance(part, int)):
            raise ValueError("`prompt` is empty")
        if numbers and len(numbers) < len(texts):
            raise ValueError("`prompt` mixes token ids and texts: send either")
        if numbers and min(numbers) < 0:
            raise ValueError("`prompt` has a negative token id")
        if self.best_of not in (None, self.n):
            raise ValueError("`best_of` is not implemented: leave it out, or use the value of `n`")
        self.check(len(self.prompts))

    @property
    def top(self) -> int | None:
        """`logprobs`."""
        return self.logprobs

    @property
    def whole(self) -> bool:
        """`echo`."""
        return self.echo

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts: texts, or token ids of which the vocabulary may have none."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [part for part in self.prompt if isinstance(part, int)]
        return [ids] if ids else [part for part in self.prompt if not isinstance(part, int)]


class _Text(Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    text: str
    cache_control: Any = None


class _Message(Struct, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Text]
    name: str | None = None

    def for_template(self) -> ChatMessage:
        """The message as chat templates take it, which know `developer` by its older name."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": content}
        return message if self.name is None else {**message, "name": self.name}


_MayCall = Annotated[Any, Meta(extra_json_schema={"enum": ["auto", "none"]})]
"""Whether the model has to call a tool: not, or as it likes."""


class Chat(Options, kw_only=True):
    """Request for the next message of a conversation.

    Tools are never called: a caller who leaves it to the model gets text.

    Attributes:
        messages: the conversation so far.
        tools, functions: that the model may call; `functions` is the older name.
        tool_choice, function_call: `auto` or `none`.
        logprobs: give the log-probability of each token.
        top_logprobs: how many of the most probable tokens to name for each token; needs `logprobs`.
    """

    messages: Annotated[list[_Message], Meta(min_length=1)]
    tools: list[dict[str, Any]] = []
    functions: list[dict[str, Any]] = []
    tool_choice: _MayCall = "auto"
    function_call: _MayCall = "auto"
    logprobs: bool = False
    top_logprobs: _Top = 0

    def __post_init__(self) -> None:
        """Check what the types leave open.

        Raises:
            ValueError: options contradict each other.
        """
        if self.top_logprobs and not self.logprobs:
            raise ValueError("`top_logprobs` needs `logprobs`: true")
        for name in ("tool_choice", "function_call"):
            if getattr(self, name) not in ("auto", "none"):
                raise ValueError(f"`{name}` asks for a call, which is not implemented: leave it out, or send `none`")
        self.check(1)

    @property
    def top(self) -> int | None:
        """`top_logprobs`, with `logprobs`."""
        return self.top_logprobs if self.logprobs else None

    @property
    def ignored(self) -> list[str]:
        """`tools` and `functions` that the model might have called."""
        offered = {"tools": self.tools and self.tool_choice, "functions": self.functions and self.function_call}
        return [name for name, choice in offered.items() if choice == "auto"]

    @property
    def conversation(self) -> list[ChatMessage]:
        """The messages as chat templates take them."""
        return [message.for_template() for message in self.messages]
