"""Which cores and which experts each of several nodes on this machine gets."""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wire.experts import UnitId, format_selector
from wire.manifest import Dims


@dataclass(frozen=True, slots=True)
class Cores:
    """Which cores run what.

    Attributes:
        station: base station, broker and the network's relay.
        nodes: one core for each node.
    """

    station: Sequence[int]
    nodes: Sequence[int]


def choose_cores(siblings: Sequence[Sequence[int]], nodes: int) -> Cores:
    """A core for each node, and the others for the base station. Pure.

    Nodes get physical cores of their own as far as there are enough, because two threads of one core share its
    arithmetic. Where there are too few even with threads, nodes share cores, and the base station may use all.

    Args:
        siblings: the threads of each physical core.
    """
    in_turn = [cpu for some in itertools.zip_longest(*siblings) for cpu in some if cpu is not None]
    if len(in_turn) <= nodes:
        return Cores(sorted(in_turn), [in_turn[node % len(in_turn)] for node in range(nodes)])
    return Cores(sorted(in_turn[nodes:]), in_turn[:nodes])


def read_siblings() -> list[list[int]]:
    """The threads of each physical core that this process may use."""
    found: dict[str, list[int]] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        key = path.read_text().strip() if path.exists() else str(cpu)
        found.setdefault(key, []).append(cpu)
    return list(found.values())


def holders_of(experts: int, slices: int, nodes: int) -> list[int]:
    """Index of the node that holds each unit of a layer.

    An expert's slices are on different nodes, and experts spread over as many disjoint groups of nodes as there are:
    two experts of one token then meet on a node as rarely as possible.
    """
    groups = max(1, nodes // slices)
    return [
        (expert % groups * slices + slice_) % nodes
        for expert, slice_ in itertools.product(range(experts), range(slices))
    ]


def selectors_of(dims: Dims, nodes: int) -> dict[str, str]:
    """What each node holds of a bundle, in every layer the same."""
    holders = holders_of(dims.experts, dims.slices, nodes)
    return {
        f"node{node}": format_selector(
            [UnitId(layer, unit) for layer in range(dims.layers) for unit, at in enumerate(holders) if at == node],
            dims.slices,
        )
        for node in range(nodes)
        if node in holders
    }
