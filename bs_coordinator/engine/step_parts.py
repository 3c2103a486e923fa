"""The parts of a step's time, as the live page and timed answers show them. Pure."""

from typing import TypedDict

from bs_coordinator.engine.step_records import StepRecord


class Parts(TypedDict):
    """Parts of a step in ms; they add up to its time and the time of drafting.

    Attributes:
        trunk_ms: attention, norms, gate and selection.
        network_ms: links and broker, for the slowest node of each layer.
        queue_ms: that node's queue, and loading experts into its memory.
        compute_ms: that node's experts.
        packing_ms: packing, unpacking and adding up.
        head_ms: embedding, final norm and LM head.
        draft_ms: drafting, before the step.
    """

    trunk_ms: float
    network_ms: float
    queue_ms: float
    compute_ms: float
    packing_ms: float
    head_ms: float
    draft_ms: float


def parts_ms(*steps: StepRecord) -> Parts:
    """The parts of all these steps together."""
    splits = [step.split_ns() for step in steps]
    head_ns = sum(step.head_ns for step in steps)
    return Parts(
        trunk_ms=as_ms(sum(split.trunk for split in splits) - head_ns),
        network_ms=as_ms(sum(split.network for split in splits)),
        queue_ms=as_ms(sum(split.wait for split in splits)),
        compute_ms=as_ms(sum(split.compute for split in splits)),
        packing_ms=as_ms(sum(split.framing for split in splits)),
        head_ms=as_ms(head_ns),
        draft_ms=as_ms(sum(step.draft_ns for step in steps)),
    )


def as_ms(ns: int) -> float:
    """A duration in ms, to the µs; never negative."""
    return round(max(0, ns) / 1e6, 3)
