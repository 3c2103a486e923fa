"""Merged tables of a run: the rows of all cells in one Parquet and one CSV file per table."""

from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from testbed.run_directory.cell_rows import CellRows, with_coordinates
from testbed.run_directory.directory import RunDir
from testbed.run_directory.failures import failures_and_gaps
from testbed.run_directory.file_metadata import described


class Merger:
    """Writes the merged files of a run, cell by cell."""

    def __init__(self, run: RunDir, folder: Path) -> None:
        """Begin to write files into `folder`; leaving the context closes them."""
        self._run, self._folder = run, folder
        self._open: dict[str, tuple[pq.ParquetWriter, pa.csv.CSVWriter]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "Merger":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add(self, rows: CellRows) -> None:
        """Append the rows of one cell."""
        for name, table in rows.tables.items():
            self._write(name, with_coordinates(self._run, rows, table))

    def add_events(self) -> None:
        """Write the tables of failed attempts and gaps."""
        failures, gaps = failures_and_gaps(self._run)
        self._write("failures", failures)
        self._write("gaps", gaps)

    def _write(self, name: str, table: pa.Table) -> None:
        table = described(table, name, self._run.manifest)
        if name not in self._open:
            paths = (self._folder / f"{name}.{ending}" for ending in ("parquet", "csv"))
            kinds = (pq.ParquetWriter, pa.csv.CSVWriter)
            parquet, csv = (
                self._stack.enter_context(kind(path, table.schema)) for kind, path in zip(kinds, paths, strict=True)
            )
            self._open[name] = parquet, csv
        for writer in self._open[name]:
            writer.write_table(table)
