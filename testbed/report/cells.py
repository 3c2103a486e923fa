"""Reads complete cells of a run, one at a time: a long run's rows need not fit into memory together."""

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from testbed.errors import RunDirectoryError
from testbed.experiment.plan import Cell, Workload
from testbed.experiment.rundir import MARKER, Marker, RunDir
from testbed.experiment.tables import COORDINATES, SCHEMAS


@dataclass(frozen=True, slots=True)
class CellRows:
    """One complete cell.

    Attributes:
        tables: those that have rows, with the columns of `SCHEMAS`.
    """

    cell: Cell
    workload: Workload
    marker: Marker
    tables: dict[str, pa.Table]

    def table(self, name: str) -> pa.Table:
        """A table, empty where the cell has no such rows."""
        return self.tables.get(name, SCHEMAS[name].empty_table())


def read_cells(run: RunDir) -> Iterator[CellRows]:
    """All complete cells in the order of running.

    Raises:
        RunDirectoryError: a file of one is damaged.
    """
    for cell in run.cells():
        if run.is_complete(cell):
            yield _read(run, cell)


def _read(run: RunDir, cell: Cell) -> CellRows:
    folder = run.cell_path(cell)
    file = folder / MARKER
    try:
        marker = run.marker(cell)
        tables = {}
        for name, rows in marker.rows.items():
            file = folder / f"{name}.parquet"
            tables[name] = _with_all_columns(pq.read_table(file), SCHEMAS[name])
            if tables[name].num_rows != rows:
                raise ValueError(f"{tables[name].num_rows} rows instead of {rows}")
    except (OSError, ValueError, KeyError, pa.ArrowException, msgspec.DecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunDirectoryError(
            f"{file} is damaged ({reason}): remove the folder {folder}, then 'wdmoe-testbed resume {run.path}' "
            "measures that cell again"
        ) from None
    return CellRows(cell, run.plan.workload(cell.workload), marker, tables)


def _with_all_columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table as it would be written today; columns that came later are empty."""
    have = set(table.column_names)
    columns = [table[f.name] if f.name in have else pa.nulls(table.num_rows, f.type) for f in schema]
    return pa.table(columns, names=schema.names).cast(schema)


def with_coordinates(run: RunDir, rows: CellRows, table: pa.Table) -> pa.Table:
    """The table with the columns in front that say where each row comes from."""
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
    """A column of numbers or booleans as float64, NaN where a row has none."""
    array = table[column].combine_chunks().cast(pa.float64())
    return np.asarray(array.to_numpy(zero_copy_only=False), dtype=np.float64)
