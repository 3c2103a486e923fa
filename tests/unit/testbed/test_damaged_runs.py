"""Run directories and archives that are damaged or made to harm: one line says what is wrong, nothing stays behind."""

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import stat
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bs_coordinator.nodes.registry import LOCAL_NODE
from common.errors import StorageError
from common.jsonl import decode_json
from testbed.archive.export import export_run
from testbed.errors import ArchiveError, RunDirectoryError
from testbed.plan.schema import Generate, Plan
from testbed.report.write import write_report
from testbed.run_directory import unpack as unpack_module
from testbed.run_directory.archive_file import CHECKSUMS, open_compressed
from testbed.run_directory.baselines import Baseline, append_baseline, read_baselines
from testbed.run_directory.cell_rows import read_cells
from testbed.run_directory.directory import EVENTS, MANIFEST, MARKER, SCHEMA, BundleFacts, Marker, RunDir, RunManifest
from testbed.run_directory.result_tables import ANSWERS, AnswerRow
from testbed.run_directory.status import lines, status_of
from testbed.run_directory.step_tables import LATENCY, LAYERS, TOKENS
from testbed.run_directory.tables import SCHEMAS
from testbed.run_directory.unpack import unpack
from tests.in_process import run_in_process
from tests.unit.testbed.test_log_tables import TOKEN


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run of one cell, without a model."""
    facts = BundleFacts(
        name="int4", path="/b", model_sha256="0" * 64, manifest_sha256="1" * 64, quantisation="int4", layers=4,
        experts=4, top_k=2,
    )  # fmt: skip
    manifest = RunManifest(
        schema=SCHEMA, name="t", created="", commit="abc", dirty=False, argv=[], cells=1, broker="", bundles=[facts],
        plan=Plan(name="t", policies=("topk",), workloads=(Generate(),)), datasets={}, network="", versions={},
        machine={}, power={}, wifi={},
    )  # fmt: skip
    run = RunDir.create(tmp_path / "run", manifest)
    run.event("run_started", left=1)
    run.event("cell_started", cell=run.cells()[0].id, what="a cell")
    tables = {
        "tokens": TOKENS.build([TOKEN]),
        "layers": LAYERS.build(TOKEN.layer_rows()),
        "latency": LATENCY.build(TOKEN.request_rows()),
        "answers": ANSWERS.build([AnswerRow(0, 0, 1, [5], "x", 10**6, 10**6, "length")]),
    }
    rows = {name: table.num_rows for name, table in tables.items()}
    marker = Marker(
        id=run.cells()[0].id, cell=run.cells()[0], where="distributed", attempt=1, started_unix_ns=1, seconds=1.0,
        rows=rows, log_ns=1, tokens=1, write_ns=1, nodes=["a"], holders=[[0]],
    )  # fmt: skip
    run.commit(run.cells()[0], tables, marker)
    return run


EVENT = b'{"event": "run_started", "unix_ns": 5}\n'


@pytest.mark.parametrize(
    "damage",
    [
        b"\x00\xff\xfe\x01garbage",
        b"5",
        b"null",
        b'["run_started"]',
        b'{"unix_ns": 5}',
        b'{"event": "cell_failed", "unix_ns": 5}',
        b'{"event": "cell_failed", "unix_ns": 5, "cell": 7, "error": "e"}',
        b'{"event": "run_resumed", "unix_ns": 5, "gap_s": Infinity}',
        b'{"event": "run_resumed", "unix_ns": 5, "gap_s": 1e999}',
        b'{"event": "x", "unix_ns": 5, "unix_ns": 6}',
        b'{"event": "x", "unix_ns": 1e30}',
        b'{"event": "x", "unix_ns": -1}',
        b'{"event": "x", "unix_ns": ' + b"8" * 5000 + b"}",
        b'{"event": "x", "unix_ns": 5, "deep": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"event": "note", "unix_ns": 5, "text": "\\udcff"}',
        b'{"event": "x", "unix_ns": 5}{"event": "x", "unix_ns": 5}',
    ],
)
def test_a_damaged_event_is_named_by_file_and_line(run: RunDir, damage: bytes) -> None:
    path = run.path / EVENTS
    path.write_bytes(EVENT + damage + b"\n" + EVENT)
    for command in ("status", "report"):
        done = run_in_process("testbed", command, run.path)
        assert done.returncode == 61, done.stderr
        assert f"{path}, line 2: " in done.stderr
        assert done.stderr.count("\n") == 1
    with pytest.raises(RunDirectoryError, match="line 2"):
        export_run(run, run.path.parent / "x.tar.gz", anonymous=False)


def test_lines_that_a_crash_cut_off_do_not_matter(run: RunDir) -> None:
    whole = (run.path / EVENTS).read_bytes()
    for rest in (EVENT[:9], EVENT[:20] + bytes(500), bytes(4096), b""):
        (run.path / EVENTS).write_bytes(whole + rest)
        assert len(run.events()) == 2
        run.event("run_finished", failed=0)
        assert run.events()[-1]["event"] == "run_finished"
        (run.path / "baselines.jsonl").write_bytes(b'{"session": 1, "ph\n')
        assert lines(status_of(run))[0].startswith("1 of 1 cells complete")
        assert read_baselines(run) == []


def test_the_lock_is_asked_without_writing(run: RunDir) -> None:
    """A run on a read-only disk, or of another user, can be looked at and packed."""
    assert not run.is_running()
    assert not (run.path / "lock").exists()
    with run.lock():
        assert run.is_running()
        assert (
            "is still running"
            in run_in_process("testbed", "export", run.path, "-o", run.path.parent / "x.tar.gz").stderr
        )
    assert not run.is_running()
    (run.path / "lock").unlink(missing_ok=True)
    (run.path / "lock").symlink_to("lock")
    with pytest.raises(StorageError, match=r"can't read .*lock"):
        run.is_running()


def test_an_old_run_without_newer_fields_is_read(run: RunDir) -> None:
    cell = run.cells()[0].id
    events: list[dict[str, object]] = [
        {"event": "run_started"}, {"event": "cell_failed", "cell": cell, "attempt": 1, "kind": "E", "error": "e"},
        {"event": "run_resumed", "gap_s": 3, "after": "cell_failed", "lost": 1},
        {"event": "alert", "kind": "hot", "subject": "a", "detail": "d", "new": []},
        {"event": "never_seen", "anything": 1e300},
    ]  # fmt: skip
    (run.path / EVENTS).write_text("".join(json.dumps({**event, "unix_ns": 10**18}) + "\n" for event in events))
    write_report(run, resamples=100)
    assert "alert: hot a: d" in lines(status_of(run))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (MANIFEST, lambda raw: raw[: len(raw) // 2]),
        (MANIFEST, lambda raw: b"\xff" + raw),
        (MANIFEST, lambda raw: raw.replace(b'"cells"', b'"cells": 1,"cells"', 1)),
        (MANIFEST, lambda raw: b'{"deep": ' + b"[" * 99_999),
        (MANIFEST, lambda raw: raw.replace(b'"repetitions": 1,', b'"repetitions": 999999999,', 1)),
        (MANIFEST, lambda raw: raw.replace(b'"name": "int4"', b'"name": "int8"', 1)),
        (MARKER, lambda raw: b""),
        (MARKER, lambda raw: raw[:-2]),
        (MARKER, lambda raw: raw.replace(b'"seconds":1.0', b'"seconds":1e999', 1)),
        (MARKER, lambda raw: raw.replace(b'"log_ns":1', b'"log_ns":' + b"9" * 400, 1)),
        (MARKER, lambda raw: raw.replace(b'"log_ns":1', b'"log_ns":-1', 1)),
        (MARKER, lambda raw: raw.replace(b'"tokens":1', b'"tokens":1,"../../manifest":1', 1)),
        (MARKER, lambda raw: raw.replace(b'"tokens":1', b'"tokens":1,"tokens":1', 1)),
        ("tokens.parquet", lambda raw: raw[: len(raw) // 2]),
        ("tokens.parquet", lambda raw: bytes(len(raw))),
        ("latency.parquet", lambda raw: raw[:99] + bytes(99) + raw[198:]),
    ],
)
def test_other_damaged_files_of_a_run_are_named(
    run: RunDir, name: str, change: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    (path,) = run.path.rglob(name)
    before = path.read_bytes()
    path.write_bytes(change(before))
    assert path.read_bytes() != before
    for command in (("report",), ("export", "--plain", "-o", tmp_path / "x.tar.gz")):
        done = run_in_process("testbed", command[0], run.path, *command[1:])
        assert done.returncode == 61, (command, done.stderr)
        assert str(path) in done.stderr
        assert done.stderr.count("\n") == 1
    assert not [path for path in run.path.iterdir() if path.name.startswith(".")]
    assert not (tmp_path / "x.tar.gz").exists()


def test_a_small_table_of_absurdly_many_rows_is_not_read_into_memory(run: RunDir) -> None:
    (path,) = run.path.rglob("tokens.parquet")
    schema = TOKENS.schema
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        few = pa.table([pa.nulls(1 << 12, field.type) for field in schema], schema=schema)
        for _ in range(8):
            writer.write_table(few)
    marker = path.with_name(MARKER)
    changed = decode_json(marker.read_bytes(), Marker)
    rows = {**changed.rows, "tokens": 8 << 12}
    marker.write_bytes(msgspec.json.encode(msgspec.structs.replace(changed, rows=rows)))

    class Memory(NamedTuple):
        available: int

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("psutil.virtual_memory", lambda: Memory(1 << 22))
        with pytest.raises(RunDirectoryError, match=r"32768 rows need \d+ MiB of memory, 4 MiB are free"):
            list(read_cells(run))


def _change(run: RunDir, name: str, column: str, values: list[Any]) -> Path:
    """Give a table of the run's cell, made if it is missing, these values in one column."""
    folder = run.cell_path(run.cells()[0])
    path, schema = folder / f"{name}.parquet", SCHEMAS[name]
    if path.exists():
        table = pq.read_table(path)
        table = pa.concat_tables([table.slice(0, 1)] * len(values)).cast(schema)
    else:
        table = pa.table([pa.nulls(len(values), field.type) for field in schema], schema=schema)
        table = _with(table, "node", ["a"] * len(values)) if "node" in schema.names else table
    pq.write_table(_with(table, column, values), path)
    marker = folder / MARKER
    changed = decode_json(marker.read_bytes(), Marker)
    rows = {**changed.rows, name: len(values)}
    marker.write_bytes(msgspec.json.encode(msgspec.structs.replace(changed, rows=rows)))
    return path


def _with(table: pa.Table, column: str, values: list[Any]) -> pa.Table:
    at = table.column_names.index(column)
    return table.set_column(at, column, pa.array(values, table.schema.field(at).type))


@pytest.mark.parametrize(
    ("name", "column", "values", "reason"),
    [
        ("tokens", "total_ns", [-1], "-1, which must not be negative"),
        ("tokens", "total_ns", [2**62], "too large to be counted with"),
        ("tokens", "pairs", [-(2**63)], "too large to be counted with"),
        ("tokens", "answer", [None], "1 empty values, where none may be"),
        ("tokens", "warm_up", [None], "1 empty values"),
        ("tokens", "began_unix_ns", [2**63 - 1], "times that are negative, absurd"),
        ("tokens", "began_unix_ns", [1, 2**61], "more than 104 days apart"),
        ("latency", "round_trip_ns", [-5], "must not be negative"),
        ("latency", "experts", ["9" * 5000], "'9{40}' is not a list of experts"),
        ("latency", "experts", [""], "'' is not a list of experts"),
        ("latency", "experts", ["1 -2"], "is not a list of experts"),
        ("latency", "experts", [None], "1 empty values"),
        ("latency", "node", ["<script>alert(1)</script>"], "node '<script>.*' is not valid"),
        ("latency", "node", ["a\x1b[2J"], r"node 'a\\x1b\[2J' is not valid"),
        ("latency", "node", ["9" * 5000], "node '9{80}' is not valid"),
        ("latency", "node", [f"n{i}" for i in range(1025)], "1025 different nodes, at most 1024"),
        ("telemetry", "wifi_ssid", [f"n{i}" for i in range(5000)], "5000 different networks"),
        ("telemetry", "board_watts", [float("inf")], "a value beyond 1e\\+15"),
        ("telemetry", "board_watts", [-1e300], "a value beyond"),
        ("answers", "prompt", [None], "1 empty values"),
        ("answers", "first_token_ns", [-1], "must not be negative"),
    ],
)
def test_impossible_values_of_tables_are_named_by_column(
    run: RunDir, name: str, column: str, values: list[Any], reason: str
) -> None:
    path = _change(run, name, column, values)
    for command in ("report", "export"):
        done = run_in_process(
            "testbed", command, run.path, *(["-o", run.path.parent / "x.tar.gz"] * (command != "report"))
        )
        assert done.returncode == 61, done.stderr
        assert re.search(f"error: {path} is damaged .column {column}: .*{reason}", done.stderr)
        assert done.stderr.count("\n") == 1
        assert done.stderr.replace("\n", "").isprintable()


def test_a_short_text_in_millions_of_rows_is_not_expanded(run: RunDir) -> None:
    path = _change(run, "answers", "text", ["y" * 1000])
    one = pq.read_table(path)
    many = pa.table({n: one[n].dictionary_encode().take(pa.array([0] * 5000)) for n in one.column_names})
    pq.write_table(many, path)
    marker = path.with_name(MARKER)
    changed = decode_json(marker.read_bytes(), Marker)
    marker.write_bytes(msgspec.json.encode(msgspec.structs.replace(changed, rows={**changed.rows, "answers": 5000})))

    class Memory(NamedTuple):
        available: int

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("psutil.virtual_memory", lambda: Memory(2 << 20))
        with pytest.raises(RunDirectoryError, match="its texts need 5 MiB of memory, 2 MiB are free"):
            list(read_cells(run))
    assert len(next(read_cells(run)).tables["answers"]) == 5000


def test_odd_but_possible_values_give_a_report(run: RunDir) -> None:
    """Nothing took time, a token has no layers, loads of experts, names that look like formulas or HTML."""
    _change(run, "tokens", "total_ns", [0])
    _change(run, "tokens", "token", [77])
    _change(run, "latency", "experts", ["600 1"])
    _change(run, "link_samples", "quantity", ["$x$<script>"])
    _change(run, "latency", "node", [LOCAL_NODE])
    path = _change(run, "link_samples", "kind", ["truth"])
    table = _with(_with(_with(pq.read_table(path), "unix_ns", [5]), "quantity", ["$x^$<script>"]), "value", [math.nan])
    pq.write_table(table, path)
    for phase in ("start", "end"):
        append_baseline(
            run,
            Baseline(
                session=1, phase=phase, kind="one-node", bundle="int4", unix_ns=5, over="<script>\x1b[2J$", token_ns=[0]
            ),
        )
    write_report(run, resamples=100)
    page, text = ((run.path / name).read_text() for name in ("report.html", "report.md"))
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert r"\<script>\x1b[2J$" in text
    with (run.path / "plots" / "requests.csv").open() as file:
        assert ["topk", "600", LOCAL_NODE, "1"] in list(csv.reader(file))


Files = Sequence[tuple[str, bytes]]


def _archive(path: Path, files: Files, *, sums: bool = True) -> Path:
    files = [(MANIFEST, b"{}"), *files]
    listed = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files)
    with open_compressed(path, "wb") as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        for name, content in [*files, *([(CHECKSUMS, listed.encode())] if sums else [])]:
            info = tarfile.TarInfo(f"run/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("ending", [".tar.gz", ".tar.zst"])
def test_what_unpacks_to_a_thousand_times_its_size_writes_nothing(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpack_module, "SMALL_BYTES", 4 << 20)
    archive = tmp_path / f"x{ending}"
    with open_compressed(archive, "wb") as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        for number in range(6):
            info = tarfile.TarInfo(f"run/{number}")
            info.size = 1 << 20
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    assert archive.stat().st_size < 20_000
    with pytest.raises(ArchiveError, match="unpacks to more than 4 MiB"):
        unpack(archive, tmp_path / "out" / "run")
    assert [path.name for path in tmp_path.iterdir()] == [archive.name]


def test_an_archive_larger_than_the_free_disk_is_refused_first(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_run(run, archive := tmp_path / "x.tar.zst", anonymous=False, report=False)

    class Disk(NamedTuple):
        free: int

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Disk(1000))
        with pytest.raises(StorageError, match="0 MiB free"):
            unpack(archive, tmp_path / "there")
    assert not (tmp_path / "there").exists()
    assert RunDir(unpack(archive, tmp_path / "there")).manifest == run.manifest


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([("a", b"1"), ("a", b"1")], "contains a twice"),
        ([("a", b"1"), ("a/b", b"2")], "'a' as a file and as a folder"),
        ([("n" * 300, b"1")], "not a plain file"),
        ([(f"line\nbreak{'0' * 64}  a", b"1")], "differ from SHA256SUMS"),
    ],
)
def test_names_that_can_not_be_unpacked_leave_nothing(files: Files, reason: str, tmp_path: Path) -> None:
    archive = _archive(tmp_path / "x.tar.gz", files)
    with pytest.raises(ArchiveError, match=reason):
        unpack(archive, tmp_path / "out" / "run")
    assert [path.name for path in tmp_path.iterdir()] == [archive.name]


@pytest.mark.parametrize("ending", [".tar.gz", ".tar.zst"])
def test_random_damage_to_archives_is_an_error_of_theirs(ending: str, tmp_path: Path) -> None:
    archive = _archive(tmp_path / f"x{ending}", [("a", os.urandom(3000)), ("b", b"1" * 3000)])
    whole = archive.read_bytes()
    with open_compressed(archive, "rb") as stream:
        tar = b"".join(iter(lambda: stream.read(1 << 16), b""))
    source = random.Random(7)  # noqa: S311 (reproducible damage)
    for number in range(120):
        inside = number % 2
        data = bytearray(tar if inside else whole)
        for _ in range(source.choice([1, 3, 20])):
            data[source.randrange(len(data))] = source.randrange(256)
        del data[source.choice([len(data), source.randrange(len(data))]) :]
        if inside:
            with open_compressed(archive, "wb") as stream:
                stream.write(bytes(data))
        else:
            archive.write_bytes(bytes(data))
        with contextlib.suppress(ArchiveError):  # some bytes, such as a file's time, mean nothing
            shutil.rmtree(unpack(archive, tmp_path / "out"))
        assert [path.name for path in tmp_path.iterdir()] == [archive.name]


def test_only_plain_files_are_archives(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.tar.gz")
    with pytest.raises(ArchiveError, match="not a plain file"):
        unpack(tmp_path / "x.tar.gz", tmp_path / "out")
    with pytest.raises(ArchiveError, match="missing"):
        unpack(tmp_path / "y.tar.gz", tmp_path / "out")


def test_the_own_key_is_made_once_or_its_folder_is_named(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="XDG_CONFIG_HOME can name another folder"):
        export_run(run, tmp_path / "x.tar.gz", report=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    export_run(run, tmp_path / "x.tar.gz", report=False)
    key = tmp_path / "settings" / "wdmoe" / "archive.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    before = key.read_bytes()
    export_run(run, tmp_path / "y.tar.gz", report=False)
    assert key.read_bytes() == before
