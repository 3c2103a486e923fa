"""A run's folder. It is only appended to while the run goes on, so a crash loses at most the cell in progress.

manifest.json   what to run, and on what: written once
events.jsonl    what happened, one line per event, in order
cells/<id>/     the rows of one cell, complete if `cell.json` exists
lock            held by the process that runs the cells
summary.json, report.*, *.parquet, plots/   made from the above by `report`
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from msgspec import Struct

from common.errors import StorageError
from common.files import atomic_write, sync
from common.jsonl import JsonLinesError, decode_strict_json, read_json_lines
from testbed.errors import RunDirectoryError
from testbed.plan.cells import MAX_CELLS, Cell, count_cells, expand
from testbed.plan.schema import Plan
from testbed.run_directory.events import Count, Nanoseconds, decode_event

T = TypeVar("T")
SCHEMA = 1
MANIFEST = "manifest.json"
EVENTS = "events.jsonl"
MARKER = "cell.json"
NOTE = "note"
"""Name of the event of an operator's note, which may also be added while the run is stopped."""


class BundleFacts(Struct, frozen=True, kw_only=True):
    """One bundle of a run.

    Attributes:
        name: the bundle's name in the plan.
        model_sha256: hash of the checkpoint that the bundle was exported from.
        manifest_sha256: hash of the bundle's manifest, which holds the hash of every expert.
    """

    name: str
    path: str
    model_sha256: str
    manifest_sha256: str
    quantisation: str
    layers: int
    experts: int
    top_k: int


class RunManifest(Struct, frozen=True, kw_only=True):
    """What a run measures, and on what.

    Attributes:
        created: local time with UTC offset.
        argv: command line, without user names in URLs.
        datasets: SHA-256 of each data set, by path.
        network: text of the emulated network's description; empty for other networks.
        versions, machine, power, wifi: facts of the base station (`testbed.facts`).
    """

    schema: int
    name: str
    created: str
    commit: str
    dirty: bool
    argv: list[str]
    plan: Plan
    cells: int
    broker: str
    bundles: list[BundleFacts]
    datasets: dict[str, str]
    network: str
    versions: dict[str, str]
    machine: dict[str, Any]
    power: dict[str, Any]
    wifi: dict[str, str]

    def bundle(self, name: str) -> BundleFacts:
        """The bundle that the plan calls `name`."""
        return next(b for b in self.bundles if b.name == name)


class Marker(Struct, frozen=True, kw_only=True):
    """The content of `cell.json`, which marks a cell as complete.

    Attributes:
        where: `distributed` or `in-process`.
        attempt: number of the attempt that succeeded, from 1.
        rows: number of rows by table.
        seconds: wall time of the cell.
        log_ns: time spent on logging while tokens were measured.
        tokens: number of tokens that `log_ns` belongs to.
        write_ns: time to write the files, after the measurement.
        nodes: ids of the nodes, of a cell on nodes.
        holders: [layers][experts], index into `nodes` of the node that holds each expert.
        shared_air: whether forecasts assumed that all links share one channel.
        commit, dirty: code that measured the cell; empty in old runs, whose manifest says it.
        load_1min: runnable processes on the base station's machine when the cell ended, mean of one minute; None in old
            runs.
    """

    id: str
    cell: Cell
    where: str
    attempt: int
    started_unix_ns: Nanoseconds
    seconds: float
    rows: dict[str, Count]
    log_ns: Nanoseconds
    tokens: Count
    write_ns: Nanoseconds
    nodes: list[str] = []
    holders: list[list[int]] = []
    shared_air: bool = False
    commit: str = ""
    dirty: bool = False
    load_1min: float | None = None


class RunDir:
    """The folder of an existing run."""

    def __init__(self, path: Path) -> None:
        """Open a run's folder.

        Raises:
            RunDirectoryError: the folder is not a run's, or its manifest is damaged or of another version.
        """
        self.path = path
        try:
            self.manifest = decode_strict_json((path / MANIFEST).read_bytes(), RunManifest)
        except OSError:
            raise RunDirectoryError(f"{path} is not a run's folder: it has no readable {MANIFEST}") from None
        except ValueError as error:
            raise RunDirectoryError(f"{path / MANIFEST} is damaged or of another version: {error}") from None
        if self.manifest.schema != SCHEMA:
            raise RunDirectoryError(f"{path} has schema {self.manifest.schema}, this version reads {SCHEMA}")
        self.plan = self.manifest.plan
        missing = {*self.plan.bundles} - {bundle.name for bundle in self.manifest.bundles}
        if missing or count_cells(self.plan) > MAX_CELLS:
            what = f"bundle {min(missing)[:80]!r} is not described" if missing else f"more than {MAX_CELLS} cells"
            raise RunDirectoryError(f"{path / MANIFEST} is damaged: {what}")

    def code_of(self, marker: Marker) -> tuple[str, bool]:
        """Commit of the code that measured a cell, and whether the files differed from that commit."""
        return (marker.commit, marker.dirty) if marker.commit else (self.manifest.commit, self.manifest.dirty)

    @staticmethod
    def check_new(path: Path) -> None:
        """Check that `create` can make the folder of a new run at `path`.

        Raises:
            RunDirectoryError: the folder exists and is not empty.
        """
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunDirectoryError(f"{path} is not empty: choose another --out, or 'resume' it if it is a run")

    @classmethod
    def create(cls, path: Path, manifest: RunManifest) -> "RunDir":
        """Make the folder of a new run.

        Raises:
            RunDirectoryError: the folder exists and is not empty.
        """
        cls.check_new(path)
        (path / "cells").mkdir(parents=True, exist_ok=True)
        with atomic_write(path / MANIFEST) as file:
            file.write(msgspec.json.format(msgspec.json.encode(manifest), indent=1))
        return cls(path)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder's lock, which only one process can.

        Raises:
            RunDirectoryError: another process holds it.
        """
        lock = FileLock(self.path / "lock", blocking=False)
        try:
            lock.acquire()
        except Timeout:
            raise RunDirectoryError(f"{self.path} is being run by another process") from None
        try:
            yield
        finally:
            lock.release()

    def is_running(self) -> bool:
        """Whether a process holds the lock, also of a run that can only be read.

        Raises:
            StorageError: the lock can't be read.
        """
        path = self.path / "lock"
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StorageError(f"can't read {path}: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(file)
        return False

    def event(self, name: str, **fields: object) -> None:
        """Append an event to `events.jsonl` and wait until it is on disk."""
        line = {"event": name, "unix_ns": time.time_ns(), "monotonic_ns": time.monotonic_ns(), **fields}
        path = self.path / EVENTS
        try:
            with path.open("a+b") as file:
                # A crash may have cut off the last line: this event must not become part of it.
                if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                    file.write(b"\n")
                # Names of files need not be UTF-8, documents must.
                file.write(json.dumps(line, ensure_ascii=False).encode(errors="replace") + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(f"can't write {path}: {error.strerror}") from error

    def events(self) -> list[dict[str, Any]]:
        """All events in order, without lines that a crash cut off.

        Raises:
            RunDirectoryError: a line is damaged.
        """
        return read_run_lines(self.path / EVENTS, decode_event)

    def cells(self) -> list[Cell]:
        """All cells of the plan, in the order in which they run."""
        return expand(self.plan)

    def cell_path(self, cell: Cell) -> Path:
        """Folder of a complete cell."""
        return self.path / "cells" / cell.id

    def is_complete(self, cell: Cell) -> bool:
        """Whether the cell has been measured completely."""
        return (self.cell_path(cell) / MARKER).exists()

    def marker(self, cell: Cell) -> Marker:
        """The marker of a complete cell.

        Raises:
            RunDirectoryError: the marker is damaged.
        """
        path = self.cell_path(cell) / MARKER
        try:
            return decode_strict_json(path.read_bytes(), Marker)
        except (OSError, ValueError) as error:
            raise damaged_cell(self, cell, path, error) from None

    def discard_unfinished(self) -> int:
        """Remove the files of cells that a crash interrupted; returns the number of such cells."""
        left = list((self.path / "cells").glob(".*"))
        for folder in left:
            shutil.rmtree(folder, ignore_errors=True)
        return len(left)

    def commit(self, cell: Cell, tables: Mapping[str, pa.Table], marker: Marker) -> None:
        """Write all files of a cell, which makes it complete; after an error none of them exist.

        Args:
            tables: by name, as the files shall hold them (`testbed.run_directory.file_metadata.described`).

        Raises:
            StorageError: the files can't be written.
        """
        temporary = self.path / "cells" / f".{cell.id}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            began_ns = time.perf_counter_ns()
            for name, table in tables.items():
                pq.write_table(table, temporary / f"{name}.parquet", compression="zstd")
                sync(temporary / f"{name}.parquet")
            marker = msgspec.structs.replace(marker, write_ns=time.perf_counter_ns() - began_ns)
            with atomic_write(temporary / MARKER) as file:
                file.write(msgspec.json.encode(marker))
            sync(temporary)
            temporary.rename(self.cell_path(cell))
            sync(temporary.parent)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise StorageError(f"can't write cell {cell.id}: {error.strerror or error}") from error


def read_run_lines(path: Path, decode: Callable[[bytes], T]) -> list[T]:
    """The decoded lines of a run's JSON Lines file, without those that a crash cut off; none if there is no file.

    Raises:
        RunDirectoryError: a line is damaged; the message names file and line.
    """
    try:
        return list(read_json_lines(path, decode, skip_cut=True))
    except FileNotFoundError:
        return []
    except JsonLinesError as error:
        raise RunDirectoryError(f"{error}: remove this line, or restore the file from a copy") from None


def damaged_cell(run: RunDir, cell: Cell, file: Path, error: Exception) -> RunDirectoryError:
    """The error of a cell with a damaged file, which says how to measure it again."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return RunDirectoryError(
        f"{file} is damaged ({reason}): remove the folder {run.cell_path(cell)} and measure the cell again with "
        f"'wdmoe-testbed resume {run.path}'"
    )
