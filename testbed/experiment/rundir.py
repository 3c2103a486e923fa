"""A run's folder: appended to while the run goes on, so that a crash loses at most the cell in flight.

manifest.json   what was to be run, on what: written once
events.jsonl    what happened, one line each, in order
cells/<id>/     the rows of one cell; complete if it is there at all, `cell.json` says so
lock            held by the process that runs
summary.json, report.*, *.parquet, plots/   made from the above by `report`
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import Struct

from common.errors import StorageError
from common.files import atomic_write, sync
from testbed.errors import RunDirectoryError
from testbed.experiment.plan import Cell, Plan, expand

SCHEMA = 1
MANIFEST = "manifest.json"
EVENTS = "events.jsonl"
MARKER = "cell.json"
NOTE = "note"
"""The event of an operator's note; it may come while nobody runs."""


class BundleFacts(Struct, frozen=True, kw_only=True):
    """One bundle of a run.

    Attributes:
        name: as in the plan.
        model_sha256: of the checkpoint it was cut from.
        manifest_sha256: of its manifest, which holds every expert's hash.
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
    """What was to be run, on what.

    Attributes:
        argv: as started, without user names in URLs.
        datasets: SHA-256 by path.
        network: the emulated network's description as it was read, else empty.
        versions, machine, power, wifi: see `testbed.experiment.facts`.
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
        """The bundle of that name in the plan."""
        return next(b for b in self.bundles if b.name == name)


class Marker(Struct, frozen=True, kw_only=True):
    """What says that a cell is complete.

    Attributes:
        rows: per table.
        seconds: wall time of the cell.
        log_ns: spent on logging while tokens were measured.
        tokens: that `log_ns` belongs to.
        write_ns: from rows to files, after measuring.
        nodes: that were asked, of a cell on nodes.
        holders: [layers][experts], which of `nodes` each expert was asked of.
        shared_air: whether forecasts assumed one channel for all links.
        commit, dirty: of the code that measured it, which `resume` may find changed; empty in old runs.
    """

    id: str
    cell: Cell
    where: str
    attempt: int
    started_unix_ns: int
    seconds: float
    rows: dict[str, int]
    log_ns: int
    tokens: int
    write_ns: int
    nodes: list[str] = []
    holders: list[list[int]] = []
    shared_air: bool = False
    commit: str = ""
    dirty: bool = False


class RunDir:
    """An existing run's folder."""

    def __init__(self, path: Path) -> None:
        """Open a folder.

        Raises:
            RunDirectoryError: it is no run's, or one of another version.
        """
        self.path = path
        try:
            self.manifest = msgspec.json.decode((path / MANIFEST).read_bytes(), type=RunManifest)
        except OSError:
            raise RunDirectoryError(f"{path} is not a run's folder: it has no readable {MANIFEST}") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise RunDirectoryError(f"{path / MANIFEST} is damaged or of another version: {error}") from None
        if self.manifest.schema != SCHEMA:
            raise RunDirectoryError(f"{path} has schema {self.manifest.schema}, this version reads {SCHEMA}")
        self.plan = self.manifest.plan

    def code_of(self, marker: Marker) -> tuple[str, bool]:
        """Commit of the code that measured a cell, and whether its files differed from it."""
        return (marker.commit, marker.dirty) if marker.commit else (self.manifest.commit, self.manifest.dirty)

    @classmethod
    def create(cls, path: Path, manifest: RunManifest) -> "RunDir":
        """Begin a run.

        Raises:
            RunDirectoryError: the folder holds something already.
        """
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunDirectoryError(f"{path} is not empty: choose another --out, or 'resume' it if it is a run")
        (path / "cells").mkdir(parents=True, exist_ok=True)
        with atomic_write(path / MANIFEST) as file:
            file.write(msgspec.json.format(msgspec.json.encode(manifest), indent=1))
        return cls(path)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only one who runs this folder.

        Raises:
            RunDirectoryError: another process is.
        """
        with (self.path / "lock").open("a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunDirectoryError(f"{self.path} is being run by another process") from None
            yield

    def is_running(self) -> bool:
        """Whether a process holds the lock."""
        try:
            with self.lock():
                return False
        except RunDirectoryError:
            return True

    def event(self, name: str, **fields: object) -> None:
        """Append one line and wait until it is on disk."""
        line = {"event": name, "unix_ns": time.time_ns(), "monotonic_ns": time.monotonic_ns(), **fields}
        path = self.path / EVENTS
        try:
            with path.open("a+b") as file:
                # A line that a crash cut off must not swallow this one.
                if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                    file.write(b"\n")
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(f"can't write {path}: {error.strerror}") from error

    def events(self) -> list[dict[str, Any]]:
        """All events; a line that a crash cut off is left out."""
        path = self.path / EVENTS
        events = []
        for line in path.read_bytes().splitlines() if path.exists() else []:
            try:
                events.append(json.loads(line))
            except ValueError:
                continue
        return events

    def cells(self) -> list[Cell]:
        """All cells of the plan, in the order of running."""
        return expand(self.plan)

    def cell_path(self, cell: Cell) -> Path:
        """Folder of a complete cell."""
        return self.path / "cells" / cell.id

    def is_complete(self, cell: Cell) -> bool:
        """Whether the cell's rows are there."""
        return (self.cell_path(cell) / MARKER).exists()

    def marker(self, cell: Cell) -> Marker:
        """Of a complete cell."""
        return msgspec.json.decode((self.cell_path(cell) / MARKER).read_bytes(), type=Marker)

    def discard_unfinished(self) -> int:
        """Remove what cells in flight left behind at a crash; how many there were."""
        left = list((self.path / "cells").glob(".*"))
        for folder in left:
            shutil.rmtree(folder, ignore_errors=True)
        return len(left)

    def commit(self, cell: Cell, tables: Mapping[str, pa.Table], marker: Marker) -> None:
        """Make a cell complete: all of its files, or none.

        Raises:
            StorageError: they could not be written.
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
