"""What a run's Parquet files say about themselves: unit and meaning of each column, and the facts of the run. Pure.

Arrow keeps metadata of fields in a form that only Arrow reads. The same is therefore in the metadata of the file,
which every reader of Parquet shows.
"""

import hashlib
import json
from collections.abc import Mapping

import msgspec
import pyarrow as pa

from testbed.run_directory.columns import field_metadata
from testbed.run_directory.directory import RunManifest
from testbed.run_directory.tables import ALL_TABLES, COORDINATES

PREFIX = "wdmoe."
"""Of all keys in a file's metadata that are ours."""
FACTS = {
    "run": "name of the run",
    "created": "when the run began, local time with UTC offset",
    "commit": "commit of the code that began the run; merged tables have each cell's own in the column `commit`",
    "dirty": "`true` if files differed from that commit",
    "version": "version of this project",
    "run_schema": "version of the run directory's format",
    "plan_sha256": "SHA-256 of the plan as compact JSON, in the order of `manifest.json`: equal for equal plans",
    "machine": "JSON: host, CPU, RAM and system of the base station",
    "table": "name of the table",
    "rows": "what one row stands for",
    "columns": "JSON: `unit` and `description` of each column",
}
"""Keys of a file's metadata after `PREFIX`, with their meaning."""
_TABLES = {table.name: table for table in ALL_TABLES}


def described(table: pa.Table, name: str, manifest: RunManifest) -> pa.Table:
    """The table with metadata of its columns and of the run; the columns keep their types and order.

    Args:
        table: may have columns that are not declared, of another version; they get no metadata.
        name: of the table, one of `ALL_TABLES`.
    """
    known = {column: field_metadata("", meaning) for column, meaning in COORDINATES.items()}
    known |= {column.name: column.metadata for column in _TABLES[name].columns}
    fields = [field.with_metadata(known.get(field.name, {})) for field in table.schema]
    columns = {field.name: _text(field.metadata or {}) for field in fields}
    facts = {
        **run_facts(manifest),
        "table": name,
        "rows": _TABLES[name].rows,
        "columns": json.dumps(columns, ensure_ascii=False),
    }
    schema = pa.schema(fields, metadata={PREFIX + key: value for key, value in facts.items()})
    return pa.table(table.columns, schema=schema)


def run_facts(manifest: RunManifest) -> dict[str, str]:
    """The facts of a run that each of its files repeats, by key of `FACTS`."""
    return {
        "run": manifest.name,
        "created": manifest.created,
        "commit": manifest.commit,
        "dirty": json.dumps(manifest.dirty),
        "version": manifest.versions.get("wdmoe", ""),
        "run_schema": str(manifest.schema),
        "plan_sha256": hashlib.sha256(msgspec.json.encode(manifest.plan)).hexdigest(),
        "machine": json.dumps(manifest.machine, ensure_ascii=False),
    }


def _text(metadata: Mapping[bytes, bytes]) -> dict[str, str]:
    return {key.decode(): value.decode() for key, value in metadata.items()}
