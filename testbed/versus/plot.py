"""Plot of a run: time per token by round trip, a panel for each kind of channel."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

from common.files import atomic_write
from testbed.network.uniform import Links
from testbed.report.page.drawing import COLOURS, MARKERS, STYLE, grid, legend
from testbed.versus.results import Results


def draw_tpot(results: Results, links: Sequence[Links], path: Path) -> None:
    """Draw every answer's TPOT as a point, lines through the medians, and floors as dotted lines, to an SVG file."""
    panels: dict[bool, list[Links]] = {}
    for one in sorted(links, key=lambda one: one.rtt_ms):
        panels.setdefault(one.shared_air, []).append(one)
    with mpl.rc_context(STYLE):
        figure, axes = grid(len(panels), width=4.6, height=3.4)
        for axis, (shared_air, lines) in zip(axes, panels.items(), strict=True):
            for number, arm in enumerate(results.arms):
                colour = COLOURS[number % len(COLOURS)]
                medians = [(one.rtt_ms, ms) for one in lines if (ms := results.tpot_ms(one.profile, arm)) is not None]
                points = [(one.rtt_ms, answer.tpot_ms) for one in lines for answer in results.of(one.profile, arm)]
                if points:
                    axis.plot(*zip(*points, strict=True), ".", color=colour, alpha=0.4)
                    marker = MARKERS[number % len(MARKERS)]
                    axis.plot(*zip(*medians, strict=True), marker=marker, color=colour, label=results.title(arm))
                floors = [(one.rtt_ms, ms) for one in lines if (ms := results.floors_ms[one.profile][arm]) is not None]
                if floors:
                    axis.plot(*zip(*floors, strict=True), ":", color=colour)
            axis.set(
                title="one channel for all" if shared_air else "a link for each device", xlabel="round trip, ms",
                ylabel="time per token, ms (dotted: links alone)", ylim=(0, None),
            )  # fmt: skip
        legend(figure, axes)
        with atomic_write(path) as file:
            figure.savefig(file, format="svg", metadata={"Date": None})
