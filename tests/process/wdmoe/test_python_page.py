"""The examples of docs/python.md run as they are written, one after the other."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from bs_coordinator.broker.processes import open_broker
from testbed.local_nodes import LocalNodes
from tests.process.wdmoe.test_runs import ROOT
from wire.manifest import Scheme

PLAN = """
name: mine
bundles: [./bundle]
nodes: 2
policies: [topk, top1]
workloads: [{kind: generate, prompts: 1, max_tokens: 4}]
"""


def test_the_examples_run(
    tiny_bundle: Callable[[Scheme], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    text = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    assert len(examples) == 5
    monkeypatch.chdir(tmp_path)
    Path("bundle").symlink_to(tiny_bundle("int4"))
    Path("plan.yaml").write_text(PLAN)
    with open_broker("embedded") as address:
        nodes = LocalNodes(Path("bundle").resolve(), address, tmp_path / "nodes")
        nodes.start("all", "L*:E*")
        try:
            names: dict[str, object] = {}
            for example in examples:
                exec(example.replace('"mqtt://127.0.0.1",', f'"{address}",'), names)  # noqa: S102
        finally:
            nodes.stop()
    out = capsys.readouterr().out
    for printed in (
        "ms per token, degraded: False", r"topk: [\d.]+ ms per token, of which", "'node1': ", "30 no broker at",
        "4/4|2/2", "policy\ntop1", r"total_ns +ns +time of the token",
    ):  # fmt: skip
        assert re.search(printed, out), printed
