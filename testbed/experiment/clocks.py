"""Rows of what nodes' clocks showed, and what follows from it for the moments of a cell."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Literal

from bs_coordinator.nodes.clock_offsets import ClockSample, NodeClock

Row = tuple[object, ...]
Moment = Literal["before", "during", "after"]
Probe = tuple[Moment, ClockSample]


def node_clocks(probes: Sequence[Probe]) -> dict[str, NodeClock]:
    """The clock of each node that answered."""
    by_node: dict[str, list[ClockSample]] = defaultdict(list)
    for _, sample in probes:
        by_node[sample.node].append(sample)
    return {node: NodeClock(samples) for node, samples in sorted(by_node.items())}


def probe_rows(probes: Sequence[Probe], clocks: dict[str, NodeClock]) -> Iterator[Row]:
    """Rows of `clock_probes`."""
    for moment, sample in probes:
        one_way = clocks[sample.node].one_way(sample)
        yield (
            *(sample.at_unix_ns, sample.node, moment, sample.sent_unix_ns, sample.node_arrived_unix_ns),
            *(sample.node_left_unix_ns, sample.arrived_unix_ns, sample.low_ns, sample.high_ns),
            *(round(one_way.down_ns), round(one_way.up_ns), round(one_way.error_ns)),
        )


def offset_rows(ticks: Sequence[tuple[int, int]], clocks: dict[str, NodeClock]) -> Iterator[Row]:
    """Rows of `clocks`: our own clocks at each tick, then each node's offset to the first of them.

    Args:
        ticks: wall and steady clock of this machine.
    """
    for unix_ns, monotonic_ns in ticks:
        yield unix_ns, monotonic_ns, None, None, None
        for node, clock in clocks.items():
            offset = clock.at(unix_ns)
            yield unix_ns, monotonic_ns, node, round(offset.offset_ns), round(offset.error_ns)
