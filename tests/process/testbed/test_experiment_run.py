"""Runs of real cells over a real broker and node processes, killed and resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from bs_coordinator.errors import DispatchError
from common.errors import StorageError
from testbed.errors import RunDirectoryError
from testbed.experiment import runner
from testbed.experiment.networks import Loopback
from testbed.experiment.start import check_unchanged, create_run, signals_interrupt
from testbed.plan.reading import read_plan
from testbed.plan.schema import Network
from testbed.run_directory.directory import RunDir
from tests.conftest import Run
from tests.waiting import PATIENCE_S, wait_until
from wire.manifest import Scheme

Bundle = Callable[[Scheme], Path]
PLAN = """
name: tiny
bundles: [{bundle}]
nodes: 2
policies: [topk, top1]
repetitions: {repetitions}
warm_up_tokens: 2
nodes_timeout_s: 20
workloads:
  - {{kind: generate, prompts: [Hello, What is rain?], max_tokens: {tokens}}}
"""
CHOICE = """
  - {kind: choice, dataset: items.jsonl, items: 4, batch: 2, repetitions: 1}
  - {kind: perplexity, texts: [The cat sat on the mat., One two three four five.], repetitions: 1}
  - {kind: choice, name: choice-here, dataset: items.jsonl, items: 4, where: in-process, repetitions: 1}
"""
ITEMS = [{"question": f"What is {i}?", "choices": ["a number", "a bird"], "label": 0} for i in range(4)]


def _write_plan(folder: Path, bundle: Path, *, repetitions: int = 2, tokens: int = 4, more: str = "") -> Path:
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, ITEMS)))
    path = folder / "plan.yaml"
    path.write_text(PLAN.format(bundle=bundle, repetitions=repetitions, tokens=tokens) + more)
    return path


def _events(run_dir: RunDir, name: str) -> list[dict[str, Any]]:
    return [event for event in run_dir.events() if event["event"] == name]


def _rows(run_dir: RunDir, table: str) -> list[dict[str, Any]]:
    """Of all complete cells."""
    rows = []
    for cell in run_dir.cells():
        path = run_dir.cell_path(cell) / f"{table}.parquet"
        if path.exists():
            rows += [{**row, "cell": cell} for row in pq.read_table(path).to_pylist()]
    return rows


@pytest.fixture(scope="module")
def finished(run_process: Run, tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A small run of every workload."""
    folder = tmp_path_factory.mktemp("finished")
    plan = _write_plan(folder, tiny_bundle("int4"), more=CHOICE)
    done = run_process("testbed", "run", plan, "--out", folder / "run")
    assert done.returncode == 0, done.stderr
    return RunDir(folder / "run")


@pytest.mark.slow
def test_clocks_are_compared_before_during_and_after(finished: RunDir) -> None:
    probes = [row for row in _rows(finished, "clock_probes") if row["cell"].workload == "generate"]
    assert {(row["node"], row["moment"]) for row in probes} == {
        (node, moment) for node in ("node0", "node1") for moment in ("before", "during", "after")
    }
    for row in probes:
        # Both clocks are the same, so every probe, alone and with the others, must allow an offset of zero.
        assert row["offset_low_ns"] <= 0 <= row["offset_high_ns"]
        round_trip_ns = row["offset_high_ns"] - row["offset_low_ns"]
        assert row["down_estimated_ns"] + row["up_estimated_ns"] == pytest.approx(round_trip_ns, abs=2)
        # Plus the drift meanwhile.
        assert row["one_way_error_ns"] <= 1.001 * round_trip_ns + 1000
    offsets = [row for row in _rows(finished, "clocks") if row["node"] is not None]
    assert {row["node"] for row in offsets} == {"node0", "node1"}
    assert all(abs(row["offset_ns"]) <= row["error_ns"] + 1 for row in offsets)


def test_cells_are_complete_and_their_rows_add_up(finished: RunDir) -> None:
    cells = finished.cells()
    assert len(cells) == 2 * 2 + 3 * 2
    for cell in cells:
        marker = finished.marker(cell)
        assert marker.cell == cell
        assert marker.rows == {
            name: pq.read_metadata(finished.cell_path(cell) / f"{name}.parquet").num_rows for name in marker.rows
        }
        assert marker.tokens > 0
        total_ns = pq.read_table(finished.cell_path(cell) / "tokens.parquet").column("total_ns").to_pylist()
        assert 0 < marker.log_ns < sum(total_ns)
    for token in _rows(finished, "tokens"):
        parts = sum(token[f"{part}_ns"] for part in ("trunk", "network", "compute", "wait", "framing"))
        assert parts == token["total_ns"]
        pairs = {"topk": 1.0, "top1": 0.5}[token["cell"].policy]
        assert token["pairs"] == pairs * token["full_pairs"]
        assert token["warm_up"] == (token["answer"] < 0)
    latency = [r for r in _rows(finished, "latency") if r["cell"].workload == "generate"]
    assert {r["node"] for r in latency} == {"node0", "node1"}


def test_equal_cells_give_equal_answers(finished: RunDir) -> None:
    """Greedy answers depend on prompt and policy only; their hashes prove it."""
    hashes: dict[tuple[str, int], set[str]] = {}
    for answer in _rows(finished, "answers"):
        hashes.setdefault((answer["cell"].policy, answer["prompt"]), set()).add(answer["token_sha256"])
    assert len(hashes) == 2 * 3  # two prompts and the warm-up's
    assert all(len(some) == 1 for some in hashes.values())


def test_accuracy_is_the_same_on_nodes_and_in_this_process(finished: RunDir) -> None:
    chosen = {(r["cell"].workload, r["cell"].policy, r["item"]): r["chosen"] for r in _rows(finished, "choices")}
    assert len(chosen) == 2 * 2 * 4
    same = [
        chosen["choice", policy, i] == chosen["choice-here", policy, i] for policy in ("topk", "top1") for i in range(4)
    ]
    assert sum(same) >= 7  # hidden states travel in fp16, which may turn a near tie
    losses = _rows(finished, "losses")
    assert len(losses) == 4
    assert all(0 < row["loss_nats"] / row["tokens"] < 20 for row in losses)


@pytest.mark.slow
def test_tokens_that_choose_alone_have_no_time_together(run_process: Run, tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, ITEMS)))
    plan = tmp_path / "plan.yaml"
    workload = "{{kind: choice, name: {0}, choosing: {0}, dataset: items.jsonl, items: 4, where: in-process}}"
    plan.write_text(
        f"name: here\nbundles: [{tiny_bundle('int4')}]\npolicies: [topk, 'subset:price=0.1']\n"
        f"workloads: [{workload.format('together')}, {workload.format('alone')}]\n"
    )
    done = run_process("testbed", "run", plan, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    rows = _rows(RunDir(tmp_path / "run"), "layers")
    predicted = {
        name: [r["predicted_ns"] for r in rows if r["cell"].workload == name and r["cell"].policy != "topk"]
        for name in ("together", "alone")
    }
    assert predicted["together"]
    assert all(predicted["together"])
    assert predicted["alone"]
    assert not any(predicted["alone"])


def test_the_manifest_says_what_was_run(finished: RunDir) -> None:
    manifest = finished.manifest
    assert manifest.bundles[0].quantisation == "int4 b32"
    assert len(manifest.bundles[0].model_sha256) == 64
    assert manifest.argv[1] == "run"
    assert {"python", "torch", "onnxruntime"} <= manifest.versions.keys()
    assert manifest.machine["cpus"] >= 1
    assert [len(sha) for sha in manifest.datasets.values()] == [64]


@pytest.mark.slow
def test_kill_in_mid_run_then_resume(run_process: Run, tiny_bundle: Bundle, tmp_path: Path) -> None:
    plan = _write_plan(tmp_path, tiny_bundle("int4"), repetitions=4, tokens=16)
    folder = tmp_path / "run"
    argv = [sys.executable, "-m", "testbed", "run", str(plan), "--out", str(folder)]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as process:
        try:
            _wait_for_cells(folder, 2)
            children = psutil.Process(process.pid).children(recursive=True)
        finally:
            process.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(children, timeout=PATIENCE_S)
    assert not alive
    killed = RunDir(folder)
    before = {c.id: _digest(killed.cell_path(c)) for c in killed.cells() if killed.is_complete(c)}
    assert 2 <= len(before) < 8
    # What a crash in the middle of writing leaves behind.
    (folder / "cells" / ".half").mkdir()
    with (folder / "events.jsonl").open("a") as file:
        file.write('{"event": "cell_fi')
    assert "stopped" in run_process("testbed", "status", folder).stdout

    done = run_process("testbed", "resume", folder)
    assert done.returncode == 0, done.stderr
    resumed = RunDir(folder)
    cells = resumed.cells()
    assert all(resumed.is_complete(cell) for cell in cells)
    assert {id: _digest(folder / "cells" / id) for id in before} == before
    assert {path.name for path in (folder / "cells").iterdir()} == {cell.id for cell in cells}
    (event,) = _events(resumed, "run_resumed")
    assert event["gap_s"] > 0
    assert event["left"] == len(cells) - len(before)
    finished = [e["cell"] for e in _events(resumed, "cell_finished")]
    assert len(finished) == len(set(finished))
    # The token log holds every answer of every cell once.
    answers = [(a["cell"].id, a["answer"]) for a in _rows(resumed, "answers")]
    assert len(answers) == len(set(answers)) == 8 * 3
    tokens = [(t["cell"].id, t["answer"], t["token"]) for t in _rows(resumed, "tokens")]
    assert len(tokens) == len(set(tokens)) == sum(a["tokens"] for a in _rows(resumed, "answers"))
    events = resumed.events()
    again = run_process("testbed", "resume", folder)
    assert again.returncode == 0
    assert "8 cells are complete" in again.stdout
    assert "nothing to resume" in again.stdout
    assert resumed.events() == events
    assert "waiting for the nodes" in done.stdout
    assert "no node holds" not in done.stdout


def test_one_runner_per_folder(run_process: Run, finished: RunDir) -> None:
    with finished.lock():
        other = run_process("testbed", "resume", finished.path)
        assert other.returncode == 61
        assert "another process" in other.stderr
        assert "10 of 10 cells complete, running" in run_process("testbed", "status", finished.path).stdout
    assert not finished.is_running()


def _wait_for_cells(folder: Path, count: int) -> None:
    # A cell that is being written has a hidden folder.
    wait_until(lambda: len(list(folder.glob("cells/[!.]*/cell.json"))) >= count, f"{count} cells", poll_s=0.02)


def _digest(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.slow
def test_failures_are_counted_and_the_run_goes_on(run_process: Run, tiny_bundle: Bundle, tmp_path: Path) -> None:
    plan = _write_plan(tmp_path, tiny_bundle("int4"), repetitions=1, more=CHOICE)
    (tmp_path / "items.jsonl").write_text("not json\n")
    done = run_process("testbed", "run", plan, "--out", tmp_path / "run")
    assert done.returncode == 63
    assert "4 of 8 cells failed" in done.stderr
    assert "Traceback" not in done.stderr
    run_dir = RunDir(tmp_path / "run")
    failed = _events(run_dir, "cell_failed")
    assert len(failed) == 2 * 4
    assert all("items.jsonl" in event["error"] for event in failed)
    assert len(_events(run_dir, "cell_given_up")) == 4
    assert "8 failed attempts, 4 cells" in run_process("testbed", "status", tmp_path / "run").stdout


def _unstarted(plan: Path, folder: Path) -> RunDir:
    return create_run(read_plan(plan), folder, console=Console(quiet=True))


def test_an_error_of_any_class_fails_its_cell_only(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch, onnxruntime and pyarrow have classes of their own."""
    run_dir = _unstarted(_write_plan(tmp_path, tiny_bundle("int4"), repetitions=1), tmp_path / "run")
    errors = [RuntimeError("can't allocate\nmemory"), OverflowError(), DispatchError("node0 left"), MemoryError()]

    def fail(*args: object) -> None:
        raise errors.pop(0)

    monkeypatch.setattr(runner, "_run_cell", fail)
    assert runner.execute(run_dir, Loopback()) == runner.Outcome(done=0, failed=2)
    failed = _events(run_dir, "cell_failed")
    assert [e["error"] for e in failed] == ["can't allocate memory", "OverflowError", "node0 left", "MemoryError"]
    assert [e["attempt"] for e in failed] == [1, 2, 1, 2]
    assert "in fail" in failed[0]["traceback"]
    assert "traceback" not in failed[2]
    assert len(_events(run_dir, "cell_given_up")) == 2


@pytest.mark.parametrize("error", [StorageError("disk full"), KeyboardInterrupt()])
def test_interruptions_and_unwritable_folders_end_a_run(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    run_dir = _unstarted(_write_plan(tmp_path, tiny_bundle("int4"), repetitions=1), tmp_path / "run")

    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(runner, "_run_cell", fail)
    with pytest.raises(type(error)):
        runner.execute(run_dir, Loopback())
    assert not _events(run_dir, "cell_failed")


def test_resume_refuses_changed_bundles_data_and_networks(
    run_process: Run, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle("int4"), bundle)
    plan = _write_plan(tmp_path, bundle, repetitions=1, more=CHOICE)
    run_dir = _unstarted(plan, tmp_path / "run")
    check_unchanged(run_dir)
    network = tmp_path / "net.yaml"
    network.write_text("links: fast\n")
    emulated = msgspec.structs.replace(run_dir.plan, network=Network(emulated=str(network)))
    run_dir.plan, run_dir.manifest = emulated, msgspec.structs.replace(run_dir.manifest, network="links: fast\n")
    check_unchanged(run_dir)
    for path in (bundle / "manifest.json", tmp_path / "items.jsonl", network):
        before = path.read_bytes()
        path.write_bytes(before + b"\n")
        with pytest.raises(RunDirectoryError, match=f"{path} has changed.*start a new run"):
            check_unchanged(run_dir)
        path.unlink()
        with pytest.raises(RunDirectoryError, match=f"{path} is missing"):
            check_unchanged(run_dir)
        path.write_bytes(before)
    (tmp_path / "items.jsonl").write_text("{}")
    resumed = run_process("testbed", "resume", run_dir.path)
    assert resumed.returncode == 61
    assert resumed.stderr.count("\n") == 1
    assert not run_dir.events()


def test_resuming_a_complete_run_changes_nothing(run_process: Run, finished: RunDir, tmp_path: Path) -> None:
    shutil.copytree(finished.path, tmp_path / "run")
    path = tmp_path / "run" / "manifest.json"
    path.write_text(path.read_text().replace("items.jsonl", "gone.jsonl"))
    assert run_process("testbed", "resume", tmp_path / "run").returncode == 0


@pytest.mark.slow
def test_sigterm_ends_a_run_cleanly(tiny_bundle: Bundle, tmp_path: Path) -> None:
    plan = _write_plan(tmp_path, tiny_bundle("int4"), repetitions=50, tokens=30)
    folder = tmp_path / "run"
    argv = [sys.executable, "-m", "testbed", "run", str(plan), "--out", str(folder)]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            _wait_for_cells(folder, 1)
            children = psutil.Process(process.pid).children(recursive=True)
        finally:
            process.terminate()
        _, errors = process.communicate()
    assert process.returncode == 130
    assert "stopping: the cell in progress is abandoned" in errors
    assert "interrupted" in errors
    assert not psutil.wait_procs(children, timeout=PATIENCE_S)[1]
    assert RunDir(folder).events()[-1]["event"] == "run_interrupted"


def test_an_interruption_in_a_finaliser_is_not_lost() -> None:
    """Exceptions raised there are swallowed."""

    class Finalised:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)  # the handler runs here

    def run_on() -> None:
        with signals_interrupt():
            Finalised()
            time.sleep(PATIENCE_S)

    with pytest.raises(KeyboardInterrupt):
        run_on()


def test_folders_that_cannot_be_used(run_process: Run, tiny_bundle: Bundle, finished: RunDir, tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="not a run's folder"):
        RunDir(tmp_path)
    plan = _write_plan(tmp_path, tiny_bundle("int4"))
    taken = run_process("testbed", "run", plan, "--out", finished.path)
    assert taken.returncode == 61
    assert "not empty" in taken.stderr
    copy = tmp_path / "copy"
    shutil.copytree(finished.path, copy)
    (copy / "manifest.json").write_text("{}")
    with pytest.raises(RunDirectoryError, match="damaged"):
        RunDir(copy)
    no_bundle = _write_plan(tmp_path, tmp_path / "nowhere")
    assert run_process("testbed", "run", no_bundle, "--out", tmp_path / "run").returncode == 11
    odd = _write_plan(tmp_path, Path("int5"))
    assert run_process("testbed", "run", odd, "--out", tmp_path / "run").returncode == 60
