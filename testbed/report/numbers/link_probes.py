"""How much of each link's bytes were probes."""

from collections import Counter
from collections.abc import Iterable

import pyarrow.compute as pc
from msgspec import Struct

from testbed.run_directory.cell_rows import CellRows, numbers
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


def count_probes(rows: CellRows) -> Counter[tuple[str, str, str]]:
    """Bytes and refused probes of a cell, by profile, node and column; empty if probes were not counted.

    Probes are counted from the first link sample, which is taken after the first token, to the last one.
    """
    total: Counter[tuple[str, str, str]] = Counter()
    if "link_samples" not in rows.tables:
        return total
    samples = rows.tables["link_samples"]
    samples = samples.filter(pc.equal(samples["kind"], COUNT))
    first: dict[tuple[str, str], float] = {}
    labels = (samples[name].to_pylist() for name in ("node", "quantity"))
    for node, quantity, value in zip(*labels, numbers(samples, "value"), strict=True):
        total[rows.cell.profile, node, quantity] = int(value - first.setdefault((node, quantity), value))
    latency = rows.table("latency")
    for node, down, up in zip(
        latency["node"].to_pylist(), numbers(latency, "down_bytes"), numbers(latency, "up_bytes"), strict=True
    ):
        if (node, "probe_down_bytes") in first:  # not the base station itself, which has no link
            total[rows.cell.profile, node, "frame_bytes"] += int(down + up)
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
