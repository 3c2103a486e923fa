"""A run over a real emulated network: rows, measured costs, and what a kill leaves behind."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from testbed.experiment.measured_costs import measured_costs
from testbed.network.emulated import down, leftovers
from testbed.run_directory.directory import RunDir
from tests.conftest import Run
from tests.needs import needs
from tests.waiting import wait_until
from wire.manifest import Scheme

Bundle = Callable[[Scheme], Path]
NAME = f"x{os.getpid()}"
NETWORK = f"""
name: {NAME}
nodes: 2
profiles:
  uneven:
    default: {{down_mbps: 50, up_mbps: 50, delay_ms: 1}}
    nodes: {{node1: {{delay_ms: 12}}}}
"""
PLAN = """
name: emulated
network: {{emulated: net.yaml}}
profiles: [uneven]
bundles: [{bundle}]
nodes: 2
policies: [topk, "subset:share=0.3"]
workloads:
  - {{kind: generate, prompts: [Hello, What is rain?], max_tokens: 12, repetitions: {repetitions}}}
  - {{kind: choice, name: far, dataset: items.jsonl, items: 6}}
  - {{kind: choice, name: here, dataset: items.jsonl, items: 6, where: in-process}}
"""
ITEMS = [{"question": f"What is {i}?", "choices": ["a number", "a bird", "rain"], "label": 0} for i in range(6)]


pytestmark = needs(network=True)


@pytest.fixture
def plan(tiny_bundle: Bundle, tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "net.yaml").write_text(NETWORK)
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, ITEMS)))
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN.format(bundle=tiny_bundle("int4"), repetitions=1))
    yield path
    if NAME in leftovers():
        down(NAME)


def _table(run_dir: RunDir, workload: str, policy: str, table: str) -> list[dict[str, object]]:
    cell = next(c for c in run_dir.cells() if (c.workload, c.policy) == (workload, policy))
    rows: list[dict[str, object]] = pq.read_table(run_dir.cell_path(cell) / f"{table}.parquet").to_pylist()
    return rows


def test_links_are_measured_and_decide(run: Run, plan: Path) -> None:
    done = run("testbed", "run", plan, "--out", plan.parent / "run")
    assert done.returncode == 0, done.stderr
    run_dir = RunDir(plan.parent / "run")
    assert NAME not in leftovers()

    samples = _table(run_dir, "generate", "topk", "link_samples")
    values: dict[tuple[object, object, object], list[object]] = {}
    for row in samples:
        values.setdefault((row["node"], row["kind"], row["quantity"]), []).append(row["value"])
    for node, rtt_ms in (("node0", 2.0), ("node1", 24.0)):
        assert set(values[node, "truth", "rtt_ms"]) == {rtt_ms}
        # Above the truth by broker and clients, and by what else this machine is doing.
        assert np.median(np.array(values[node, "estimate", "rtt_ms"], float)) > rtt_ms

    # With one expert in two far away, the policy that looks at links asks the near node.
    far = {}
    for policy in ("topk", "subset:share=0.3"):
        asked = [row["node"] for row in _table(run_dir, "generate", policy, "latency") if not row["warm_up"]]
        far[policy] = asked.count("node1") / len(asked)
    assert far["subset:share=0.3"] < 0.5 * far["topk"]

    # Top-k does not depend on links, so both paths must choose the same, item by item.
    chosen = [[row["chosen"] for row in _table(run_dir, where, "topk", "choices")] for where in ("far", "here")]
    assert chosen[0] == chosen[1]

    here = next(c for c in run_dir.cells() if c.workload == "here")
    costs = measured_costs(run_dir, here)
    assert costs is not None
    forecast = costs.forecast(0)
    near, distant = (forecast.fixed_s[forecast.holder[expert]] for expert in (0, 1))
    assert distant - near > 0.011  # of 22 ms


@pytest.mark.slow
def test_a_killed_run_is_resumed_on_a_new_network(run: Run, plan: Path, tiny_bundle: Bundle) -> None:
    plan.write_text(PLAN.format(bundle=tiny_bundle("int4"), repetitions=3))
    folder = plan.parent / "run"
    argv = [sys.executable, "-m", "testbed", "run", str(plan), "--out", str(folder)]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as process:
        wait_until(lambda: list(folder.glob("cells/[!.]*/cell.json")), "a cell", poll_s=0.02)
        process.send_signal(signal.SIGKILL)
    done = run("testbed", "resume", folder)
    assert done.returncode == 0, done.stderr
    run_dir = RunDir(folder)
    assert all(run_dir.is_complete(cell) for cell in run_dir.cells())
    (event,) = [e for e in run_dir.events() if e["event"] == "run_resumed"]
    assert event["gap_s"] > 0
    assert NAME not in leftovers()


@pytest.mark.parametrize(("line", "words"), [("profiles: [uneven]", "profiles: [calm]"), ("nodes: 2", "nodes: 3")])
def test_a_plan_that_its_network_cannot_serve(run: Run, plan: Path, line: str, words: str) -> None:
    plan.write_text(plan.read_text().replace(line, words))
    done = run("testbed", "run", plan, "--out", plan.parent / "run")
    assert done.returncode == 60
    assert "net.yaml has no" in done.stderr
    assert not (plan.parent / "run").exists()
