"""The data dictionary of a run: every table and column with its unit and meaning."""

import msgspec
import pyarrow as pa
from msgspec import Struct

from testbed.run_directory.tables import ALL_TABLES, COORDINATES


class ColumnEntry(Struct, frozen=True):
    """One column.

    Attributes:
        unit: empty for counts, names and truth values.
    """

    name: str
    type: str
    unit: str
    meaning: str


class TableEntry(Struct, frozen=True):
    """One table.

    Attributes:
        rows: what one row stands for.
    """

    name: str
    rows: str
    columns: list[ColumnEntry]


def dictionary() -> list[TableEntry]:
    """All tables of a run with their columns."""
    return [
        TableEntry(
            table.name,
            table.rows,
            [ColumnEntry(c.name, _type_name(c.dtype), c.unit, c.meaning) for c in table.columns],
        )
        for table in ALL_TABLES
    ]


def dictionary_json() -> bytes:
    """The dictionary for programs."""
    return msgspec.json.format(msgspec.json.encode(dictionary()), indent=1) + b"\n"


def dictionary_markdown() -> str:
    """The dictionary for people."""
    lines = [
        "# Data dictionary",
        "",
        "Durations are measured with the base station's steady clock, `node_*` durations with the node's own. An "
        "unknown value is empty (null). Tables of cells are in `cells/<id>/<table>.parquet`. Merged tables "
        "(`<table>.parquet` and `<table>.csv`) begin with these columns:",
        "",
    ]
    lines += [f"- `{name}`: {meaning}" for name, meaning in COORDINATES.items()]
    for table in dictionary():
        lines += ["", f"## `{table.name}`", "", f"{table.rows[0].upper()}{table.rows[1:]}.", ""]
        lines += ["| column | type | unit | meaning |", "|---|---|---|---|"]
        lines += [f"| `{c.name}` | {c.type} | {c.unit} | {c.meaning} |" for c in table.columns]
    return "\n".join(lines) + "\n"


def _type_name(dtype: pa.DataType) -> str:
    return "text" if pa.types.is_dictionary(dtype) or pa.types.is_string(dtype) else str(dtype)


if __name__ == "__main__":
    print(dictionary_markdown(), end="")  # docs/tables.md
