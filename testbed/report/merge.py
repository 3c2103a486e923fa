"""Merged tables of a run: every cell's rows in one Parquet and one CSV file per table."""

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from testbed.experiment.rundir import RunDir
from testbed.report.cells import CellRows, with_coordinates

FAILURES = pa.schema(
    [
        ("unix_ns", pa.int64()), ("cell", pa.string()), ("what", pa.string()), ("attempt", pa.int64()),
        ("kind", pa.string()), ("error", pa.string()),
    ]
)  # fmt: skip
GAPS = pa.schema([("unix_ns", pa.int64()), ("gap_s", pa.float64()), ("after", pa.string()), ("lost", pa.int64())])


class Merger:
    """Writes the merged files of a run cell by cell."""

    def __init__(self, run: RunDir, folder: Path) -> None:
        """Files go into `folder`."""
        self._run, self._folder = run, folder
        self._open: dict[str, tuple[pq.ParquetWriter, pa.csv.CSVWriter]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "Merger":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add(self, rows: CellRows) -> None:
        """Append one cell."""
        for name, table in rows.tables.items():
            self._write(name, with_coordinates(self._run, rows, table))

    def add_events(self) -> None:
        """Failed attempts and gaps, from the run's events."""
        failures, gaps = failures_and_gaps(self._run)
        self._write("failures", failures)
        self._write("gaps", gaps)

    def _write(self, name: str, table: pa.Table) -> None:
        if name not in self._open:
            paths = (self._folder / f"{name}.{ending}" for ending in ("parquet", "csv"))
            kinds = (pq.ParquetWriter, pa.csv.CSVWriter)
            parquet, csv = (
                self._stack.enter_context(kind(path, table.schema)) for kind, path in zip(kinds, paths, strict=True)
            )
            self._open[name] = parquet, csv
        for writer in self._open[name]:
            writer.write_table(table)


def failures_and_gaps(run: RunDir) -> tuple[pa.Table, pa.Table]:
    """Failed attempts, also of cells that are complete by now; and each pause before a resumption."""
    events = run.events()
    names = {cell.id: str(cell) for cell in run.cells()}
    failed = (event | {"what": names.get(event["cell"], "")} for event in events if event["event"] == "cell_failed")
    resumed = (event for event in events if event["event"] == "run_resumed")
    return _table(failed, FAILURES), _table(resumed, GAPS)


def _table(events: Iterable[dict[str, object]], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist([{name: event.get(name) for name in schema.names} for event in events], schema=schema)
