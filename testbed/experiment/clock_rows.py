"""Rows of nodes' clocks: each probe, and what all probes of a cell say about the moments of its samples."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from bs_coordinator.nodes.clock_offsets import ClockSample, NodeClock
from testbed.run_directory.machine_tables import ClockProbeRow, ClockRow, Moment

Probe = tuple[Moment, ClockSample]


def node_clocks(probes: Sequence[Probe]) -> dict[str, NodeClock]:
    """The clock of each node that answered a probe."""
    by_node: dict[str, list[ClockSample]] = defaultdict(list)
    for _, sample in probes:
        by_node[sample.node].append(sample)
    return {node: NodeClock(samples) for node, samples in sorted(by_node.items())}


def probe_rows(probes: Sequence[Probe], clocks: dict[str, NodeClock]) -> Iterator[ClockProbeRow]:
    """Rows of `clock_probes`."""
    for moment, sample in probes:
        yield ClockProbeRow(moment, sample, clocks[sample.node].one_way(sample))


def clock_rows(ticks: Sequence[tuple[int, int]], clocks: dict[str, NodeClock]) -> Iterator[ClockRow]:
    """Rows of `clocks`: the base station's clocks at each tick, then the offset of each node's wall clock.

    Args:
        ticks: wall and steady clock of the base station, in ns.
    """
    for unix_ns, monotonic_ns in ticks:
        yield ClockRow(unix_ns, monotonic_ns)
        for node, clock in clocks.items():
            yield ClockRow(unix_ns, monotonic_ns, node, clock.at(unix_ns))
