"""The suite of random faults: its schedule, and a short run of it with real processes."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.network.spec import read_spec
from testbed.proof.chaos.schedule import KINDS, Kind, draw
from testbed.proof.chaos.system import network_description
from tests.conftest import Run
from tests.needs import needs

NODES = [f"node{k}" for k in range(8)]


@given(st.integers(0, 99), st.integers(0, 999), st.sets(st.sampled_from(KINDS), min_size=1))
def test_faults_are_drawn_from_the_allowed_ones_and_repeat_with_the_seed(
    seed: int, answer: int, kinds: set[Kind]
) -> None:
    allowed = sorted(kinds)
    faults = draw(seed, answer, NODES, allowed, tokens=64)
    assert faults == draw(seed, answer, NODES, allowed, tokens=64)
    assert 1 <= len(faults) <= 2
    assert {fault.kind for fault in faults} <= kinds
    assert all(0 < fault.after_tokens < 32 for fault in faults)


def test_every_kind_is_equally_often_the_first_fault() -> None:
    first = Counter(draw(3, answer, NODES, KINDS, tokens=64)[0].kind for answer in range(10 * len(KINDS)))
    assert set(first.values()) == {10}


def test_the_network_has_a_profile_for_every_link_fault(tmp_path: Path) -> None:
    (tmp_path / "network.yaml").write_text(json.dumps(network_description(NODES)))
    profiles = read_spec(tmp_path / "network.yaml").profiles
    assert {"calm", "loss-30", "blackhole-node7", "slow-node0"} <= set(profiles)
    assert profiles["blackhole-node7"].link("node7", 0.0).loss_percent == 100


@pytest.mark.slow
@needs("mosquitto")
def test_a_short_run_on_localhost(run_process: Run, tmp_path: Path) -> None:
    faults = [word for kind in ("kill", "broker", "noise", "base-station", "disk") for word in ("--fault", kind)]
    done = run_process(
        "testbed", "chaos", "--localhost", "--answers", 5, "--nodes", 4, "--tokens", 48, *faults, "--out", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    answers = json.loads((tmp_path / "chaos.json").read_text())["answers"]
    assert {fault["kind"] for answer in answers for fault in answer["faults"]} == {
        "kill", "broker", "noise", "base-station", "disk",
    }  # fmt: skip
    assert {answer["outcome"] for answer in answers} <= {"right", "degraded", "failed"}
    assert sum(answer["resumed"] for answer in answers) >= 1


@pytest.mark.slow
def test_a_short_soak_grows_nothing_and_logs_every_layer(run_process: Run, tmp_path: Path) -> None:
    done = run_process("testbed", "soak", "--tokens", 300, "--churn", 5, "--out", tmp_path / "soak")
    assert done.returncode == 0, done.stderr
    assert "log: complete" in done.stdout
    again = run_process("testbed", "soak", "--tokens", 300, "--out", tmp_path / "soak")
    assert (again.returncode, "holds a log already" in again.stderr) == (2, True)
