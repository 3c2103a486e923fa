"""How much of each link's bytes were probes."""

from collections import Counter
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc
from msgspec import Struct

from testbed.run_directory.cell_rows import numbers
from testbed.run_directory.machine_tables import COUNT


class LinkProbes(Struct, frozen=True, kw_only=True):
    """Bytes on one node's link, both directions together, in all cells of a profile.

    Attributes:
        probe_bytes: frames of probes and of their answers.
        frame_bytes: frames of requests and of their answers.
        share: of both together that were probes.
        refused: probes that did not fit into the budget.
    """

    profile: str
    node: str
    probe_bytes: int
    frame_bytes: int
    share: float
    refused: int


def count_probes(profile: str, samples: pa.Table, latency: pa.Table) -> Counter[tuple[str, str, str]]:
    """Bytes and refused probes of a cell, by profile, node and column; empty if probes were not counted.

    Args:
        profile: the cell's link profile.
        samples: its link samples. Probes are counted from the first, which is taken after the first token, to the last.
        latency: its requests.
    """
    total: Counter[tuple[str, str, str]] = Counter()
    samples = samples.filter(pc.equal(samples["kind"], COUNT))
    first: dict[tuple[str, str], float] = {}
    labels = (samples[name].to_pylist() for name in ("node", "quantity"))
    for node, quantity, value in zip(*labels, numbers(samples, "value"), strict=True):
        total[profile, node, quantity] = int(value - first.setdefault((node, quantity), value))
    for node, down, up in zip(
        latency["node"].to_pylist(), numbers(latency, "down_bytes"), numbers(latency, "up_bytes"), strict=True
    ):
        if (node, "probe_down_bytes") in first:  # not the base station itself, which has no link
            total[profile, node, "frame_bytes"] += int(down + up)
    return total


def link_probes(total: Counter[tuple[str, str, str]]) -> list[LinkProbes]:
    """The sums over cells, one row per profile and node."""
    return [*_rows(total, dict.fromkeys((profile, node) for profile, node, _ in total))]


def _rows(total: Counter[tuple[str, str, str]], links: Iterable[tuple[str, str]]) -> Iterable[LinkProbes]:
    for profile, node in links:
        probes = total[profile, node, "probe_down_bytes"] + total[profile, node, "probe_up_bytes"]
        frames = total[profile, node, "frame_bytes"]
        yield LinkProbes(
            profile=profile,
            node=node,
            probe_bytes=probes,
            frame_bytes=frames,
            share=probes / max(1, probes + frames),
            refused=total[profile, node, "probes_refused"],
        )
