"""What a plan of `wdmoe-bs place` assumes because it was neither measured nor stated, as lines for people."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bs_coordinator.commands.place.boards import DEFAULT_LINK

if TYPE_CHECKING:
    from bs_coordinator.placement.boards import Board
    from bs_coordinator.placement.fleet_plan import Wanted


def assumptions(
    boards: "Sequence[Board]", wanted: "Wanted", quantisation: str, trunk_ms: float | None, *, traffic: Path | None
) -> list[str]:
    """A line for each assumption."""
    from bs_coordinator.placement.predict import TRUNK_BYTES_PER_S

    lines = []
    if trunk_ms is None:
        lines.append(
            f"trunk: {1e3 * wanted.station.trunk_s.first:.1f} ms per token, its weights in bf16 read at "
            f"{1e-9 * TRUNK_BYTES_PER_S:.0f} GB/s; --trunk-ms states what was measured"
        )
    lines += _assumed_links(boards)
    if traffic is None:
        lines.append("routing: all experts are asked equally often; --traffic takes a run's latency.csv")
    if wanted.draft is not None:
        lines.append("drafts: making them takes no time")
    if wanted.resident_bytes:
        lines.append(f"experts on the base station: read at {1e-9 * wanted.resident_bytes_per_s:.0f} GB/s")
    # A speed that was measured with another quantisation says nothing of this one.
    unmeasured = [board for board in boards if quantisation not in board.byte_s]
    for kind, facts in {board.kind: board.facts for board in unmeasured}.items():
        lines.append(
            f"{kind}: {1e-9 * facts.memory_bytes_per_s:.0f} GB/s ({facts.source}); --tuned states measurements"
        )
    return lines


def _assumed_links(boards: "Sequence[Board]") -> list[str]:
    """What of the links was neither measured nor stated: a line for all boards of which the same is assumed."""
    mbps, rtt_ms = DEFAULT_LINK
    words = {
        "rtt_s": f"a round trip of {rtt_ms:.0f} ms", "down_mbps": f"{mbps:.0f} Mbit/s to the board",
        "up_mbps": f"{mbps:.0f} Mbit/s from the board",
    }  # fmt: skip
    names: dict[frozenset[str], list[str]] = {}
    for board in boards:
        names.setdefault(board.link_assumed, []).append(board.name)
    lines = []
    for what, some in names.items():
        which = "links" if len(some) == len(boards) else f"links of {', '.join(some)}"
        if what == words.keys():
            lines.append(f"{which}: {mbps:.0f} Mbit/s and {rtt_ms:.0f} ms, not measured; see --link and --links")
        elif what:
            assumed = " and ".join(word for field, word in words.items() if field in what)
            lines.append(f"{which}: {assumed}, because the measurement is too uncertain; --link states a link")
    return lines
