"""Reads the rows of complete cells one cell at a time, so that a long run doesn't have to fit into memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from testbed.plan.cells import Cell
from testbed.plan.schema import Workload
from testbed.run_directory.columns import TEXT
from testbed.run_directory.directory import MARKER, Marker, RunDir, damaged_cell
from testbed.run_directory.table_checks import check_values
from testbed.run_directory.tables import COORDINATES, SCHEMAS

_VALUE_BYTES = 8


@dataclass(frozen=True, slots=True)
class CellRows:
    """One complete cell.

    Attributes:
        tables: tables that have rows, by name, with the columns of `SCHEMAS`.
    """

    cell: Cell
    workload: Workload
    marker: Marker
    tables: dict[str, pa.Table]

    def table(self, name: str) -> pa.Table:
        """A table by name; empty if the cell has no such rows."""
        return self.tables.get(name, SCHEMAS[name].empty_table())


def read_cells(run: RunDir, *, only: str | None = None) -> Iterator[CellRows]:
    """All complete cells in the order in which they run.

    Args:
        only: read this table and no other; None for all.

    Raises:
        RunDirectoryError: a file of a cell is damaged.
    """
    for cell in run.cells():
        if run.is_complete(cell):
            yield _read(run, cell, only)


def _read(run: RunDir, cell: Cell, only: str | None) -> CellRows:
    marker = run.marker(cell)
    file = run.cell_path(cell) / MARKER
    try:
        if unknown := marker.rows.keys() - SCHEMAS.keys():
            raise ValueError(f"no table of a cell is called {min(unknown)[:80]!r}")
        tables = {}
        for name, rows in marker.rows.items():
            if only not in (None, name):
                continue
            file = run.cell_path(cell) / f"{name}.parquet"
            tables[name] = _with_all_columns(_read_table(name, file, rows), SCHEMAS[name])
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise damaged_cell(run, cell, file, error) from None
    return CellRows(cell, run.plan.workload(cell.workload), marker, tables)


def _read_table(name: str, file: Path, rows: int) -> pa.Table:
    """A table, if it has this number of rows and fits into memory: a small file may claim any number of rows.

    Raises:
        ValueError: another number of rows, too many for this machine's free memory, or a value that is impossible.
        OSError, pa.ArrowException: the file is damaged.
    """
    schema = SCHEMAS[name]
    texts = [field.name for field in schema if not pa.types.is_primitive(field.type)]
    # As dictionaries, because the same long text may stand in millions of rows.
    with pq.ParquetFile(file, read_dictionary=texts) as parquet:
        claimed = parquet.metadata.num_rows
        if claimed != rows:
            raise ValueError(f"{claimed} rows instead of {rows}")
        needed, free = claimed * parquet.metadata.num_columns * _VALUE_BYTES, psutil.virtual_memory().available
        if needed > free:
            raise ValueError(f"its {claimed} rows need {needed >> 20} MiB of memory, {free >> 20} MiB are free")
        table = parquet.read()
    needed = sum(_expanded_bytes(table[f.name]) for f in schema if f.type == TEXT and f.name in table.column_names)
    if needed > free:
        raise ValueError(f"its texts need {needed >> 20} MiB of memory, {free >> 20} MiB are free")
    known = [field for field in schema if field.name in table.column_names]
    check_values(name, table.select([field.name for field in known]).cast(pa.schema(known)))
    return table


def _expanded_bytes(texts: pa.ChunkedArray) -> int:
    """Bytes of a column of texts, each as often as it stands in it."""
    total = 0
    for chunk in texts.chunks:
        if isinstance(chunk, pa.DictionaryArray):
            lengths = pc.binary_length(chunk.dictionary).cast(pa.int64())
            total += pc.sum(lengths.take(chunk.indices)).as_py() or 0
    return total


def _with_all_columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with today's columns; those that an old run doesn't have are empty."""
    have = set(table.column_names)
    columns = [table[f.name] if f.name in have else pa.nulls(table.num_rows, f.type) for f in schema]
    return pa.table(columns, names=schema.names).cast(schema)


def with_coordinates(run: RunDir, rows: CellRows, table: pa.Table) -> pa.Table:
    """The table with the columns of `COORDINATES` in front, which say where its rows come from."""
    cell = rows.cell
    commit, _ = run.code_of(rows.marker)
    values = dict(
        zip(
            COORDINATES,
            (
                *(run.manifest.name, commit, cell.id, cell.repetition),
                *(cell.bundle, cell.profile, cell.workload, cell.policy),
            ),
            strict=True,
        )
    )
    columns = {name: pa.repeat(value, table.num_rows) for name, value in values.items()}
    return pa.table({**columns, **{name: table[name] for name in table.column_names}})


def numbers(table: pa.Table, column: str) -> NDArray[np.float64]:
    """A column of numbers or booleans as float64 [rows], NaN where the column is empty."""
    array = table[column].combine_chunks().cast(pa.float64())
    return np.asarray(array.to_numpy(zero_copy_only=False), dtype=np.float64)
