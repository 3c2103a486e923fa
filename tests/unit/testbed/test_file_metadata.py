"""What the Parquet files of a run say about themselves, read back without this project's code."""

import hashlib
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from testbed.archive.export import export_run
from testbed.plan.schema import Generate, Plan
from testbed.report.merge import Merger
from testbed.run_directory.cell_rows import read_cells
from testbed.run_directory.directory import MANIFEST, SCHEMA, BundleFacts, Marker, RunDir, RunManifest
from testbed.run_directory.file_metadata import FACTS, PREFIX, described
from testbed.run_directory.result_tables import ANSWERS, AnswerRow
from testbed.run_directory.step_tables import LATENCY, LAYERS, TOKENS
from testbed.run_directory.tables import COORDINATES
from testbed.run_directory.unpack import unpack
from tests.unit.testbed.test_log_tables import TOKEN

HOST = "annas-laptop"


@pytest.fixture(params=[True, False], ids=["with metadata", "of an older version"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> RunDir:
    """A run of one cell, without a model."""
    facts = BundleFacts(
        name="int4", path="/b", model_sha256="0" * 64, manifest_sha256="1" * 64, quantisation="int4", layers=4,
        experts=4, top_k=2,
    )  # fmt: skip
    manifest = RunManifest(
        schema=SCHEMA, name="t", created="2026-11-30T09:00:00+0000", commit="abc", dirty=False, argv=[], cells=1,
        broker="", bundles=[facts], plan=Plan(name="t", policies=("topk",), workloads=(Generate(),)), datasets={},
        network="", versions={"wdmoe": "0.1.0"}, machine={"host": HOST, "cpus": 4}, power={}, wifi={},
    )  # fmt: skip
    run = RunDir.create(tmp_path / "run", manifest)
    tables = {
        "tokens": TOKENS.build([TOKEN]),
        "layers": LAYERS.build(TOKEN.layer_rows()),
        "latency": LATENCY.build(TOKEN.request_rows()),
        "answers": ANSWERS.build([AnswerRow(0, 0, 1, [5], "x", 10**6, 10**6, "length")]),
    }
    cell = run.cells()[0]
    marker = Marker(
        id=cell.id, cell=cell, where="distributed", attempt=1, started_unix_ns=1, seconds=1.0, log_ns=1, tokens=1,
        rows={name: table.num_rows for name, table in tables.items()}, write_ns=1, nodes=["a"], holders=[[0]],
    )  # fmt: skip
    if request.param:
        tables = {name: described(table, name, manifest) for name, table in tables.items()}
    else:
        tables = {name: table.cast(table.schema.remove_metadata()) for name, table in tables.items()}
    run.commit(cell, tables, marker)
    return run


def _facts(file: Path) -> dict[str, str]:
    found = pq.read_metadata(file).metadata
    return {key.decode(): value.decode() for key, value in found.items() if key.startswith(PREFIX.encode())}


def test_merged_files_name_the_run_and_each_column(run: RunDir) -> None:
    with Merger(run, run.path) as merger:
        for rows in read_cells(run):
            merger.add(rows)
    for declared in (TOKENS, LAYERS, LATENCY, ANSWERS):
        file = run.path / f"{declared.name}.parquet"
        schema, facts = pq.read_schema(file), _facts(file)
        assert facts.keys() == {PREFIX + key for key in FACTS}
        columns = json.loads(facts["wdmoe.columns"])
        assert list(columns) == schema.names == [*COORDINATES, *(column.name for column in declared.columns)]
        for column in declared.columns:
            expected = {"description": column.meaning} | ({"unit": column.unit} if column.unit else {})
            assert columns[column.name] == expected
            assert {k.decode(): v.decode() for k, v in schema.field(column.name).metadata.items()} == expected
        manifest = json.loads((run.path / MANIFEST).read_text())
        plan = json.dumps(manifest["plan"], separators=(",", ":"), ensure_ascii=False)
        assert facts["wdmoe.plan_sha256"] == hashlib.sha256(plan.encode()).hexdigest()
        assert json.loads(facts["wdmoe.machine"]) == {"host": HOST, "cpus": 4}
        named = {key: facts[f"wdmoe.{key}"] for key in ("run", "commit", "dirty", "version", "run_schema", "table")}
        assert named == {
            "run": "t", "commit": "abc", "dirty": "false", "version": "0.1.0", "run_schema": "1",
            "table": declared.name,
        }  # fmt: skip


def test_the_metadata_of_an_archive_have_pseudonyms_too(run: RunDir, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(b"k" * 32)
    key.chmod(0o600)
    archive = tmp_path / "shelf.tar.gz"
    export_run(run, archive, key_file=key, report=False)
    folder = unpack(archive, tmp_path / "opened")
    files = list(folder.rglob("*.parquet"))
    assert len(files) == 4
    for file in files:
        assert HOST.encode() not in file.read_bytes()
        facts = _facts(file)
        assert json.loads(facts["wdmoe.machine"])["host"].startswith("host-")
        assert facts["wdmoe.table"] == file.stem
