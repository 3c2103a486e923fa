"""A report as headings, tables and figures, written as markdown or as one HTML file that stands alone."""

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

_WIDEST = 48
"""Wider cells of a markdown table are not lined up."""


@dataclass(frozen=True, slots=True)
class Table:
    """Cells are text; the first `labels` columns name the row, the others hold numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    labels: int = 1


@dataclass(frozen=True, slots=True)
class Figure:
    """A plot.

    Attributes:
        file: PNG, relative to the report.
        caption: what it shows and how to read it.
    """

    file: str
    caption: str


@dataclass(slots=True)
class Section:
    """A heading with what follows it.

    Attributes:
        blocks: paragraphs, tables and figures in their order.
    """

    title: str
    blocks: list[str | Table | Figure] = field(default_factory=list)


@dataclass(slots=True)
class Document:
    """A report.

    Attributes:
        warnings: shown first of all.
    """

    title: str
    warnings: list[str]
    sections: list[Section]


def markdown(document: Document) -> str:
    """GitHub's dialect."""
    lines = [f"# {_escape(document.title)}", ""]
    for warning in document.warnings:
        lines += [f"> **{_escape(warning)}**", ""]
    for section in document.sections:
        lines += [f"## {_escape(section.title)}", ""]
        for block in section.blocks:
            if isinstance(block, Table):
                lines += [table_markdown(block), ""]
            elif isinstance(block, Figure):
                lines += [f"![{_escape(block.caption)}]({block.file})", "", f"*{_escape(block.caption)}*", ""]
            else:
                lines += [_escape(block), ""]
    return "\n".join(lines)


def table_markdown(table: Table) -> str:
    """Aligned, so that it can be read as it is."""
    rows = [[_escape(text).replace("|", "\\|") for text in row] for row in (table.header, *table.rows)]
    widths = [min(_WIDEST, max(3, *(len(row[i]) for row in rows))) for i in range(len(table.header))]
    rule = ["-" * (w - (i >= table.labels)) + ":" * (i >= table.labels) for i, w in enumerate(widths)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            c.ljust(w) if i < table.labels else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    return "\n".join([line(rows[0]), line(rule), *map(line, rows[1:])])


def html(document: Document, folder: Path) -> str:
    """One page with style and plots in it.

    Args:
        folder: where the figures' files are.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def image(figure: Figure) -> str:
        return "data:image/png;base64," + base64.b64encode((folder / figure.file).read_bytes()).decode()

    return environment.get_template("report.html.j2").render(
        document=document, image=image, is_table=_is(Table), is_figure=_is(Figure)
    )


def _is(kind: type) -> Callable[[object], bool]:
    return lambda block: isinstance(block, kind)


def _escape(text: str) -> str:
    """Markdown's own signs as text."""
    for sign in ("\\", "*", "_", "<", "`"):
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())
