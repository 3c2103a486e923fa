"""Random faults on an emulated network, as `wdmoe-testbed chaos` runs by default."""

import json
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.needs import needs


@pytest.mark.slow
@needs("mosquitto", network=True)
def test_answers_survive_a_slow_link(run: Run, tmp_path: Path) -> None:
    done = run(
        "testbed", "chaos", "--answers", 2, "--nodes", 3, "--tokens", 24, "--fault", "slow", "--out", tmp_path,
        timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    answers = json.loads((tmp_path / "chaos.json").read_text())["answers"]
    assert {answer["outcome"] for answer in answers} <= {"right", "degraded"}
