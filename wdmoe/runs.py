"""Experiments and their tables."""

import logging
import time
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from common.config import ConfigError
from common.extras import needs_extra
from testbed.run_directory.cell_rows import read_cells, with_coordinates
from testbed.run_directory.columns import TEXT
from testbed.run_directory.directory import RunDir, RunManifest
from testbed.run_directory.failures import failures_and_gaps
from testbed.run_directory.tables import ALL_TABLES, COORDINATES

if TYPE_CHECKING:
    from pandas import DataFrame

log = logging.getLogger("wdmoe")

_TABLES = {table.name: table for table in ALL_TABLES}
_OF_EVENTS = ("failures", "gaps")


class Run:
    """A run's folder and its tables, which docs/tables.md describes column by column.

    Each table is an attribute, such as `run.tokens`, `run.layers` or `run.latency`: a pandas DataFrame of the rows of
    all complete cells, read anew at each use. `table` returns the same without pandas.

    Attributes:
        folder: where the run is.
        manifest: what was run, on which machine, with which code.
    """

    folder: Path
    manifest: RunManifest

    def __init__(self, folder: Path) -> None:
        """Open a run's folder.

        Raises:
            RunDirectoryError: it is not a run's.
        """
        self.folder = folder
        self._run = RunDir(folder)
        self.manifest = self._run.manifest

    def table(self, name: str) -> pa.Table:
        """A table by name. Its first columns say which cell, policy, profile and workload a row belongs to.

        Raises:
            ConfigError: there is no table of that name.
            RunDirectoryError: a file of the run is damaged.
        """
        if name not in _TABLES:
            raise ConfigError(f"no table is called '{name}': choose from {', '.join(_TABLES)}")
        if name in _OF_EVENTS:
            return dict(zip(_OF_EVENTS, failures_and_gaps(self._run), strict=True))[name]
        parts = [
            with_coordinates(self._run, rows, rows.table(name)) for rows in read_cells(self._run, only=name)
        ]  # fmt: skip
        if not parts:
            return _empty(name)
        return pa.concat_tables(parts).unify_dictionaries()

    def describe(self, name: str) -> "DataFrame":
        """Type, unit and meaning of each column of a table.

        Raises:
            ConfigError: there is no table of that name.
            MissingPackageError: pandas is not installed.
        """
        if name not in _TABLES:
            raise ConfigError(f"no table is called '{name}': choose from {', '.join(_TABLES)}")
        coordinates = {} if name in _OF_EVENTS else COORDINATES
        rows = [(column, "", meaning) for column, meaning in coordinates.items()]
        rows += [(column.name, column.unit, column.meaning) for column in _TABLES[name].columns]
        with needs_extra("pandas"):
            from pandas import DataFrame
        return DataFrame(rows, columns=["column", "unit", "meaning"]).set_index("column")

    def __getattr__(self, name: str) -> "DataFrame":
        if name not in _TABLES:
            raise AttributeError(f"a run has no attribute '{name}'; its tables are {', '.join(_TABLES)}")
        with needs_extra("pandas"):
            import pandas  # noqa: F401 - Arrow would name it, but not the extra
        return self.table(name).to_pandas()

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *_TABLES]

    def __repr__(self) -> str:
        complete = sum(self._run.is_complete(cell) for cell in self._run.cells())
        return f"Run('{self.folder}'): {self.manifest.name}, {complete} of {self.manifest.cells} cells complete"


def load_run(folder: str | PathLike[str]) -> Run:
    """A run from its folder, complete or not.

    Raises:
        RunDirectoryError: the folder is not a run's.
    """
    return Run(Path(folder))


def run_experiment(
    plan: str | PathLike[str], *, data: str | PathLike[str] | None = None, out: str | PathLike[str] | None = None,
    items: int | None = None, jobs: int = 1, device: str | None = None,
    on_progress: Callable[[str], None] = log.info,
) -> Run:  # fmt: skip
    """Run an experiment, as `wdmoe-testbed run` does.

    Args:
        plan: YAML file (docs/experiments.md).
        data: folder of the data sets; None for the plan's own folder.
        out: the run's folder, which must be empty if it exists; None for `runs/NAME-TIME`.
        items: use at most this many items of each data set.
        jobs: processes for cells without nodes.
        device: `cuda` computes the experts of cells without nodes on the GPUs.
        on_progress: called with a line for each cell.

    Raises:
        ConfigError: `items` or `jobs` is less than 1.
        PlanError: the plan is wrong, or a bundle or data set is missing.
        RunDirectoryError: `out` is not empty.
        FailedCellsError: some cells failed; `load_run(out)` has the others.
        WdmoeError: another part can't be started.
    """
    from rich.console import Console

    from testbed.plan.reading import at_most, read_plan
    from testbed.run_directory.directory import RunDir

    for name, value in (("items", items), ("jobs", jobs)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}: {value} is less than 1")
    read = read_plan(Path(plan), data=Path(data) if data is not None else None)
    if items is not None:
        read = at_most(read, items)
    folder = Path(out) if out is not None else Path("runs") / time.strftime(f"{read.name}-%Y%m%d-%H%M%S")
    RunDir.check_new(folder)
    # Later, because torch is slow to import.
    from testbed.evaluation.torch_runtime import check_device
    from testbed.experiment.start import complete, create_run

    check_device(device)
    run = create_run(read, folder, console=Console(stderr=True))
    complete(run, jobs=jobs, device=device, on_progress=on_progress)
    return Run(folder)


def _empty(name: str) -> pa.Table:
    fields: list[Any] = [(column, pa.int64() if column == "repetition" else TEXT) for column in COORDINATES]
    return pa.schema([*fields, *_TABLES[name].schema]).empty_table()
