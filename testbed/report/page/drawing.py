"""What the plots of a report share: style, panels, legends, files.

The colours are those of Okabe and Ito, which colour-blind readers can distinguish; lines also differ in their dashes.
"""

import csv
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.font_manager import FontProperties, findfont, get_font

from testbed.report.numbers.analysis import Arm
from testbed.report.numbers.summary import ArmResult, Summary
from testbed.report.page.document import Figure
from testbed.report.page.labels import policy_label
from testbed.statistics import Interval

COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
DASHES = ("-", "--", ":", "-.")
MARKERS = "osD^vPX*<>"
STYLE: Any = {
    "font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True, "svg.hashsalt": "wdmoe",
    "figure.dpi": 120, "text.parse_math": False,
}  # fmt: skip
Row = tuple[object, ...]
_TITLE_CHARACTERS = 44
_LEGEND_LINE_INCHES = 0.17
_GLYPHS = frozenset(get_font(findfont(FontProperties())).get_charmap())


def panel_of(summary: Summary, arm: Arm | ArmResult, workload: str) -> str:
    """Title of the panel of an arm and workload; coordinates that all arms share are left out."""
    several = [len({getattr(a, field) for a in summary.arms}) > 1 for field in ("bundle", "profile")]
    named = [Path(arm.bundle).name if several[0] else "", arm.profile if several[1] else "", workload]
    return wrap(", ".join(filter(None, named)), _TITLE_CHARACTERS)


def grid(count: int, *, columns: int = 3, width: float = 3.9, height: float = 3.0) -> tuple[Canvas, list[Axes]]:
    """A figure of panels, at most three in a row; sizes are of one panel, in inches."""
    columns = min(columns, 3, count)
    lines = -(-count // columns)
    figure = Canvas(figsize=(max(4.8, width * columns), height * lines + 0.7), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def line_style(policies: Sequence[str], policy: str) -> dict[str, Any]:
    """Colour, dashes and label of a policy, the same in all plots."""
    i = policies.index(policy)
    return {
        "color": COLOURS[i % len(COLOURS)],
        "linestyle": DASHES[i % len(DASHES)],
        "label": wrap(policy_label(policy, policies), 40),
    }


def legend(figure: Canvas, axes: Sequence[Axes]) -> None:
    """Draw one legend for all panels, below them."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if not found:
        return
    longest = max(max(map(len, label.splitlines())) for label in found)
    columns = max(1, min(len(found), int(figure.get_size_inches()[0] * 13 / (longest + 7))))
    lines = -(-len(found) // columns) * max(1 + label.count("\n") for label in found)
    # The panels keep their height, however long the legend is.
    figure.set_figheight(figure.get_figheight() + _LEGEND_LINE_INCHES * lines)
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns, frameon=False)


def wrap(text: str, width: int) -> str:
    """The text in lines, with a box for each character that the plots' font doesn't have."""
    text = "".join(c if ord(c) in _GLYPHS else "\N{WHITE SQUARE}" for c in text)
    return "\n".join(textwrap.wrap(re.sub(r",\s*", ", ", text), width, break_long_words=False)) or text


def ends(interval: Interval) -> tuple[object, ...]:
    """Value and limits, for a row of a CSV file."""
    return interval.value, interval.low, interval.high


def bars(interval: Interval, scale: float) -> list[list[float]] | None:
    """Distances of the limits from the value, as error bars take them; None without limits."""
    if interval.low is None or interval.high is None:
        return None
    return [[scale * (interval.value - interval.low)], [scale * (interval.high - interval.value)]]


def save(figure: Canvas, folder: Path, name: str, header: Row, rows: Sequence[Row], caption: str) -> Figure:
    """Write a plot as PNG and SVG, and its data as CSV, to `folder`/plots."""
    path = folder / "plots" / name
    figure.savefig(path.with_suffix(".png"))
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return Figure(f"plots/{name}.png", caption)
