"""A run that is left alone: nodes are lost and come back, sessions measure baselines, operators note things."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from testbed.run_directory.baselines import read_baselines
from testbed.run_directory.directory import RunDir
from tests.conftest import Run
from tests.waiting import wait_until
from wire.manifest import Scheme

PLAN = """
name: alone
bundles: [{bundle}]
nodes: {{a: 'L*:E0-7', b: 'L*:E0-7'}}
policies: [topk]
repetitions: 4
warm_up_tokens: 1
pause_s: 1.5
churn: {{every_s: 2, down_s: 1}}
baselines: {{tokens: 3, kinds: [station, loopback, wifi]}}
limits: {{silent_s: 5}}
workloads:
  - {{kind: generate, prompts: [Hello], max_tokens: 8}}
"""


@pytest.mark.slow
def test_a_run_survives_lost_nodes_and_reports_them(
    run_process: Run, tiny_bundle: Callable[[Scheme], Path], tmp_path: Path
) -> None:
    plan, folder = tmp_path / "plan.yaml", tmp_path / "run"
    plan.write_text(PLAN.format(bundle=tiny_bundle("int4")))
    prepared = run_process("testbed", "run", plan, "--out", folder, "--prepare")
    assert prepared.returncode == 0, prepared.stderr
    assert run_process("testbed", "note", folder, "two boards on the shelf").returncode == 0
    argv = [sys.executable, "-m", "testbed", "resume", str(folder)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        wait_until((folder / "live.json").exists, "the run")
        shown = run_process("testbed", "status", folder, "--follow")
        said, _ = process.communicate()
    assert process.returncode == 0, said
    assert "4 of 4 cells complete" in shown.stdout
    found = RunDir(folder)
    events = found.events()
    names = [event["event"] for event in events]
    assert names[:2] == ["note", "run_started"]
    killed = [event["node"] for event in events if event["event"] == "node_killed"]
    assert killed
    lost = [e for e in events if e["event"] == "alert" and e["kind"] == "node_lost"]
    assert {e["subject"] for e in lost} == set(killed)
    assert {e["subject"] for e in events if e["event"] == "alert_over"} == set(killed)
    assert [b.phase for b in read_baselines(found) if b.kind == "station"] == ["start", "end"]
    assert all(len(b.token_ns) == 2 for b in read_baselines(found) if b.kind != "wifi")
    assert {b.why_not for b in read_baselines(found) if b.kind == "wifi"} == {
        "the nodes are on this machine's loopback"
    }
    reported = run_process("testbed", "report", folder, "--resamples", "100")
    assert reported.returncode == 0, reported.stderr
    page = (folder / "report.md").read_text()
    assert "two boards on the shelf" in page
    assert "## Alerts" in page
    assert "## Baselines" in page
    text = run_process("testbed", "note", folder, "  ")
    assert text.returncode == 61
    assert run_process("testbed", "note", folder, "x", "--photo", plan).returncode == 61
