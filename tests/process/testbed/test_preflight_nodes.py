"""Preflight with real nodes."""

import os
import subprocess
from pathlib import Path

import pytest

from testbed.local_nodes import LocalNodes
from tests.conftest import Run
from tests.waiting import wait_until


@pytest.mark.slow
def test_preflight_asks_running_nodes(run: Run, fleet: LocalNodes, tmp_path: Path) -> None:
    plan_path = tmp_path / "plan.yaml"
    plan_path.write_text(
        f"{{name: outside, network: {{external: {{broker: '{fleet.address}', cluster: {fleet.cluster}}}}}, "
        f"bundles: [{fleet.bundle}], nodes: {{pi1: 'L*:E0-3', pi2: 'L*:E4-7'}}, policies: [topk], "
        "workloads: [{kind: generate}]}"
    )

    def ask_until(text: str) -> subprocess.CompletedProcess[str]:
        answers: list[subprocess.CompletedProcess[str]] = []

        def answers_with_text() -> bool:
            answers.append(
                run("testbed", "preflight", plan_path, "--out", tmp_path, env={**os.environ, "COLUMNS": "300"})
            )
            return text in answers[-1].stdout

        wait_until(answers_with_text, text)
        return answers[-1]

    fleet.start("pi1", "L*:E0-3")
    half = ask_until("L0-1:E0-3, fp32")
    assert half.returncode == 62
    assert "with TCP_NODELAY" in half.stdout
    assert "no node holds L0-1:E4-7" in half.stdout
    assert "node pi2, online: no message from it" in half.stderr
    fleet.start("pi2", "L*:E4-7")
    assert ask_until("every expert has a holder").returncode == 0
    plan_path.write_text(plan_path.read_text().replace(str(fleet.address), "mqtt://127.0.0.1:1"))
    assert "127.0.0.1" in run("testbed", "preflight", plan_path).stderr
