"""Answers and their tokens, with times in ns, under the names that the table `tokens` in docs/tables.md has."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bs_coordinator.engine.answer_stats import AnswerStats, summarise
from bs_coordinator.engine.sequence import StopReason, TokenEvent

if TYPE_CHECKING:
    from wdmoe.session import EventStream


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer.

    A draft token that was right came with the token before it: all its times are 0.

    Attributes:
        id: of the token.
        text: what it adds to the answer; empty for the token that ends it.
        stop: why the answer ends here: `eos`, `max-tokens` or `context`; None if it goes on.
        degraded: other experts than the preferred ones were asked, because no node could answer for these.
        total_ns: time of the token, that of the prompt included for the first one: the sum of the parts below.
        trunk_ns: attention, norms, gate, selection and head on the base station.
        network_ns: of each layer's slowest request: links, broker, MQTT clients.
        compute_ns: of each layer's slowest request: the node's experts.
        wait_ns: of each layer's slowest request: the node's queue and its reading of experts from disk.
        framing_ns: the rest: packing, unpacking, adding up.
        draft_ns: making the draft tokens.
        layer_waits_ns: for each layer, the time from the chosen experts to their combined output; for the first token
            of a long prompt, of all layers of each of its steps.
    """

    id: int
    text: str
    stop: StopReason | None
    degraded: bool
    total_ns: int
    trunk_ns: int
    network_ns: int
    compute_ns: int
    wait_ns: int
    framing_ns: int
    draft_ns: int
    layer_waits_ns: tuple[int, ...]

    @classmethod
    def of(cls, event: TokenEvent) -> "Token":
        """The token of an event, without the records of its steps, which take 58 KiB."""
        steps = event.steps
        splits = [step.split_ns() for step in steps]
        layers = [layer for step in steps for layer in step.layers]
        draft_ns = sum(step.draft_ns for step in steps)
        return cls(
            id=event.id,
            text=event.text,
            stop=event.stop,
            degraded=event.degraded,
            total_ns=sum(step.total_ns for step in steps) + draft_ns,
            trunk_ns=sum(split.trunk for split in splits),
            network_ns=sum(split.network for split in splits),
            compute_ns=sum(split.compute for split in splits),
            wait_ns=sum(split.wait for split in splits),
            framing_ns=sum(split.framing for split in splits),
            draft_ns=draft_ns,
            layer_waits_ns=tuple(layer.dispatch_ns for layer in layers),
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer.

    Attributes:
        tokens: in their order.
        stats: means over the answer (`bs_coordinator.engine.answer_stats.AnswerStats`): `ttft_ms`, `tpot_ms`
            and its parts, `drafted` and `accepted`, bytes, and `tokens_by_node`.
    """

    tokens: tuple[Token, ...]
    stats: AnswerStats

    @classmethod
    def of(cls, events: Sequence[TokenEvent]) -> "Answer":
        """The answer of all its events."""
        return cls(tuple(map(Token.of, events)), summarise(events))

    @property
    def text(self) -> str:
        """The answer's text."""
        return "".join(token.text for token in self.tokens)

    @property
    def token_ids(self) -> list[int]:
        """Ids of the tokens."""
        return [token.id for token in self.tokens]

    @property
    def stop(self) -> StopReason | None:
        """Why the answer ended: `eos`, `max-tokens` or `context`."""
        return self.tokens[-1].stop

    @property
    def degraded(self) -> bool:
        """Whether a token was computed without some preferred expert."""
        return any(token.degraded for token in self.tokens)

    def __str__(self) -> str:
        return self.text


class TokenStream:
    """The tokens of an answer as they come. Leaving the loop, or `close`, ends the answer."""

    def __init__(self, events: "EventStream") -> None:
        """The answer has begun."""
        self._events = events

    def __iter__(self) -> "TokenStream":
        return self

    def __next__(self) -> Token:
        return Token.of(next(self._events))

    def close(self) -> None:
        """End the answer, if it is not over."""
        self._events.close()
