"""What a caller asks of the answers thread, and what the thread sends back."""

from collections.abc import Callable
from typing import NamedTuple

from bs_coordinator.config import SamplingConfig
from bs_coordinator.engine.sequence import Sequence, TokenEvent
from bs_coordinator.selection import Policy
from common.errors import WdmoeError


class StreamUpdate(NamedTuple):
    """What a step did for a request: new tokens, or the error that ended it."""

    events: list[TokenEvent]
    error: WdmoeError | None = None


class TraceHeaders(NamedTuple):
    """The caller's trace, as the headers of W3C Trace Context name it; empty without one."""

    traceparent: str = ""
    tracestate: str = ""


NO_TRACE = TraceHeaders()


class SharedPrompt:
    """A prompt that several requests continue: the first of them computes it, and the others copy its KV cache.

    Attributes:
        sequence: of the first request; None until it begins. Belongs to the answers thread.
    """

    def __init__(self) -> None:
        self.sequence: Sequence | None = None


class Request(NamedTuple):
    """One accepted request.

    Attributes:
        sampling: how to choose the answer's tokens.
        deliver: called from the serving thread with each update; must not block.
        accepted_s: on the server's monotonic clock.
        same_text: the answer continues the prompt's text, rather than beginning one of its own.
        policy: chooses the experts of this answer's tokens; None for the base station's own.
        trace: that the answer belongs to.
        shared: what it shares with other requests of the same prompt; None for nothing.
    """

    sampling: SamplingConfig
    deliver: Callable[[StreamUpdate], None]
    accepted_s: float
    same_text: bool
    policy: Policy | None = None
    trace: TraceHeaders = NO_TRACE
    shared: SharedPrompt | None = None
