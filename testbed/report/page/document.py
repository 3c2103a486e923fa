"""A document of headings, tables and figures, written as Markdown or as one self-contained HTML file."""

import base64
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from common.console import printable

_WIDEST = 48
"""Wider cells of a Markdown table are not aligned."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text cells. The first `labels` columns name the row, the others are numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    labels: int = 1


@dataclass(frozen=True, slots=True)
class Figure:
    """A plot.

    Attributes:
        file: path of the PNG, relative to the report.
        caption: what the plot shows and how to read it.
    """

    file: str
    caption: str


@dataclass(slots=True)
class Section:
    """A heading and the blocks below it: paragraphs, tables and figures."""

    title: str
    blocks: list[str | Table | Figure] = field(default_factory=list)


@dataclass(slots=True)
class Document:
    """A report.

    Attributes:
        warnings: why its numbers are doubtful; before everything else.
        notes: what else a reader should know before any number.
        summary: the result in a few sentences.
    """

    title: str
    warnings: list[str]
    notes: list[str]
    summary: list[str]
    sections: list[Section]

    @property
    def anchors(self) -> list[str]:
        """An anchor for each section, as GitHub makes them of headings."""
        found: list[str] = []
        for section in self.sections:
            name = re.sub(r"[^\w\- ]", "", section.title.lower()).replace(" ", "-")
            taken = sum(other == name or re.fullmatch(rf"{re.escape(name)}-\d+", other) is not None for other in found)
            found.append(f"{name}-{taken}" if taken else name)
        return found


def markdown(document: Document) -> str:
    """The document in GitHub's dialect of Markdown."""
    lines = [f"# {_escape(document.title)}", ""]
    for warning in document.warnings:
        lines += [f"> **{_escape(warning)}**", ""]
    for note in document.notes:
        lines += [f"> {_escape(note)}", ""]
    lines += [_escape(" ".join(document.summary)), "", "Contents:", ""]
    titles = zip(document.sections, document.anchors, strict=True)
    lines += [*(f"- [{_escape(section.title)}](#{anchor})" for section, anchor in titles), ""]
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
    """A table in Markdown with aligned columns, readable as plain text."""
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
    """The document as one HTML page that contains its style and plots.

    Args:
        folder: folder of the figures' files.
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
    """Escape control characters and the characters that Markdown interprets, and join lines."""
    for sign in ("\\", "*", "_", "<", "`"):
        text = text.replace(sign, "\\" + sign)
    return printable(" ".join(text.split()))
