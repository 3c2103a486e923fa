"""Statistics of one answer: TTFT, TPOT, and how the latter was spent (docs/measurement.md defines them)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bs_coordinator.engine.sequence import TokenEvent
from bs_coordinator.engine.step_records import TimeSplit


@dataclass(frozen=True, slots=True)
class AnswerStats:
    """Statistics of one answer. Decoded tokens are all but the first.

    Attributes:
        tokens: generated.
        steps: forward steps that the decoded tokens took.
        drafted, accepted: draft tokens, and how many of them were accepted.
        ttft_ms: TTFT of an answer that waits for no other: the time of the prompt's steps.
        tpot_ms: TPOT: time per decoded token, drafting included.
        draft_ms: drafting, per decoded token.
        trunk_ms, network_ms, compute_ms, wait_ms, framing_ms: per decoded token, as in `TimeSplit`.
        down_bytes, up_bytes: per decoded token, all frames to and from the nodes.
        tokens_by_node: rows of hidden states that each node computed, prompt included.
    """

    tokens: int
    steps: int
    drafted: int
    accepted: int
    ttft_ms: float
    tpot_ms: float
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
    """Statistics of the answer made of these tokens.

    Raises:
        ValueError: there are no tokens.
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
        ttft_ms=sum(step.total_ns for step in first.steps) / 1e6,
        tpot_ms=sum(step.total_ns for step in decode) / count / 1e6 + draft_ms,
        draft_ms=draft_ms,
        down_bytes=sum(d.down_bytes for d in dispatches) / count,
        up_bytes=sum(d.up_bytes for d in dispatches) / count,
        tokens_by_node=dict(sorted(by_node.items())),
        **parts,
    )


def one_line(stats: AnswerStats) -> str:
    """One line for the console, without drafting figures where nothing was drafted."""
    drafts = drafting = ""
    if stats.drafted:
        drafts = f" · {stats.accepted} of {stats.drafted} draft tokens accepted, {stats.steps} steps"
        drafting = f"drafting {stats.draft_ms:.1f}, "
    return (
        f"{stats.tokens} tokens · TTFT {stats.ttft_ms:.0f} ms · TPOT {stats.tpot_ms:.1f} ms: "
        f"{drafting}trunk {stats.trunk_ms:.1f}, network {stats.network_ms:.1f}, "
        f"node compute {stats.compute_ms:.1f}, wait {stats.wait_ms:.1f}, framing {stats.framing_ms:.1f} · "
        f"{stats.down_bytes / 1024:.0f} KiB down, {stats.up_bytes / 1024:.0f} KiB up per token{drafts}"
    )
