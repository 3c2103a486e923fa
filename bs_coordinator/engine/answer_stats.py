"""The numbers under an answer: time to first token, ms per token and where they went."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bs_coordinator.engine.sequence import TokenEvent
from bs_coordinator.engine.step_records import TimeSplit


@dataclass(frozen=True, slots=True)
class AnswerStats:
    """One answer in numbers; times in ms, means per decoded token.

    Attributes:
        steps: that the decoded tokens took.
        drafted, accepted: tokens guessed on the way, and how many of them were right.
        draft_ms: making the guesses.
        down_bytes: per decoded token, BS to nodes, all frames.
        tokens_by_node: rows of hidden states that each node computed on, prompt included.
    """

    tokens: int
    steps: int
    drafted: int
    accepted: int
    first_token_ms: float
    token_ms: float
    draft_ms: float
    trunk_ms: float
    network_ms: float
    compute_ms: float
    wait_ms: float
    framing_ms: float
    down_bytes: float
    up_bytes: float
    tokens_by_node: dict[str, int]


def summarise(events: Sequence[TokenEvent]) -> AnswerStats:
    """Numbers of one answer.

    Raises:
        ValueError: no token at all.
    """
    if not events:
        raise ValueError("no token was generated")
    first, *rest = events
    decode = [step for event in rest for step in event.steps]
    count = max(1, len(rest))
    splits = [step.split_ns() for step in decode]

    def mean_ms(part: str) -> float:
        total_ns: int = sum(getattr(split, part) for split in splits)
        return total_ns / count / 1e6

    dispatches = [d for step in decode for layer in step.layers for d in layer.dispatches]
    by_node: Counter[str] = Counter()
    for event in events:
        for step in event.steps:
            for layer in step.layers:
                for dispatch in layer.dispatches:
                    by_node[dispatch.node] += dispatch.tokens
    parts = {f"{part}_ms": mean_ms(part) for part in TimeSplit.__dataclass_fields__}
    draft_ms = sum(step.draft_ns for step in decode) / count / 1e6
    return AnswerStats(
        tokens=len(events),
        steps=len(decode),
        drafted=sum(step.drafted for step in decode),
        accepted=sum(step.accepted for step in decode),
        first_token_ms=sum(step.total_ns for step in first.steps) / 1e6,
        token_ms=sum(step.total_ns for step in decode) / count / 1e6 + draft_ms,
        draft_ms=draft_ms,
        down_bytes=sum(d.down_bytes for d in dispatches) / count,
        up_bytes=sum(d.up_bytes for d in dispatches) / count,
        tokens_by_node=dict(sorted(by_node.items())),
        **parts,
    )


def one_line(stats: AnswerStats) -> str:
    """For under an answer."""
    drafts = f" · {stats.accepted} of {stats.drafted} guesses right, {stats.steps} steps" if stats.drafted else ""
    making = f"guessing {stats.draft_ms:.1f}, " if stats.drafted else ""
    return (
        f"{stats.tokens} tokens · first after {stats.first_token_ms:.0f} ms · then {stats.token_ms:.1f} ms "
        f"each: {making}trunk {stats.trunk_ms:.1f}, network {stats.network_ms:.1f}, "
        f"node compute {stats.compute_ms:.1f}, wait {stats.wait_ms:.1f}, framing {stats.framing_ms:.1f} · "
        f"{stats.down_bytes / 1024:.0f} KiB down, {stats.up_bytes / 1024:.0f} KiB up per token{drafts}"
    )
