"""The data dictionary of a run: every table and column with its unit and meaning."""

import msgspec
import pyarrow as pa
from msgspec import Struct

from testbed.run_directory.file_metadata import FACTS, PREFIX
from testbed.run_directory.tables import ALL_TABLES, COORDINATES

_METADATA = """\
## Metadata of the files

Each Parquet file says what is in it. With pyarrow, a column's field has `unit` and `description`; DuckDB, Polars and
other readers find the same in the file's own metadata. Older files without metadata are read as well; `report` writes
the merged ones anew, with metadata.

```python
import json
import duckdb, polars
import pyarrow.parquet as pq

file = "runs/first/tokens.parquet"
pq.read_schema(file).field("total_ns").metadata  # {b'unit': b'ns', b'description': b'time of the token: …'}
polars.read_parquet_metadata(file)["wdmoe.commit"]
facts = duckdb.sql(f"select decode(key), decode(value) from parquet_kv_metadata('{file}')").fetchall()
json.loads(dict(facts)["wdmoe.columns"])["total_ns"]["unit"]
```

Keys of a file's metadata:"""


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
    lines += ["", *_METADATA.splitlines(), ""]
    lines += [f"- `{PREFIX}{name}`: {meaning}" for name, meaning in FACTS.items()]
    for table in dictionary():
        lines += ["", f"## `{table.name}`", "", f"{table.rows[0].upper()}{table.rows[1:]}.", ""]
        lines += ["| column | type | unit | meaning |", "|---|---|---|---|"]
        lines += [f"| `{c.name}` | {c.type} | {c.unit} | {c.meaning} |" for c in table.columns]
    return "\n".join(lines) + "\n"


def _type_name(dtype: pa.DataType) -> str:
    return "text" if pa.types.is_dictionary(dtype) or pa.types.is_string(dtype) else str(dtype)


if __name__ == "__main__":
    print(dictionary_markdown(), end="")  # docs/tables.md
