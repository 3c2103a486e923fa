"""The options of nodes and of residents as on a device with four cores, whose defaults this machine may not have.

In processes of their own: onnxruntime has one pool of threads per process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_node.experts.runtime import ExpertRuntime
from wire.manifest import load_manifest
from wire.probe import probe_input

_FOUR_CORES = "import os; os.cpu_count = lambda: 4; os.sched_getaffinity = lambda pid: {0, 1, 2, 3}\n"
_RUNTIME = (
    _FOUR_CORES
    + """
import json, sys
from pathlib import Path
import numpy as np
from edge_node.devices import DetectedDevice, threads_for
from edge_node.experts.runtime import ExpertRuntime
from exporter.expert.probe import check_probe, probe_tolerance
from wire.manifest import load_manifest
from wire.probe import probe_input

bundle, prepacked, out, threads = sys.argv[1:]
bundle, manifest = Path(bundle), load_manifest(Path(bundle))
threads = int(threads) or threads_for(DetectedDevice("generic-arm64", "test"))
ids = [entry.id for entry in manifest.experts[:3]]
outputs = []
for folder in (None, Path(prepacked), Path(prepacked)):
    for most_loaded in (None, 1):
        runtime = ExpertRuntime(bundle, manifest, ids, threads=threads, prepacked=folder, most_loaded=most_loaded)
        outputs.append([runtime.run(id, probe_input(manifest.dims.hidden, 2)).tolist() for id in ids])
check_probe(bundle, manifest.experts[0], manifest.dims.hidden, probe_tolerance(manifest.quantisation))
Path(out).write_text(json.dumps({"threads": threads, "outputs": outputs}))
"""
)
_STATION = (
    _FOUR_CORES
    + "from bs_coordinator.commands.main import cli; from common.console import run; run(cli, 'wdmoe-bs', extra='bs')"
)


def _python(script: str, state: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, encoding="utf-8", timeout=600,
        check=False, env={**os.environ, "XDG_STATE_HOME": str(state)},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("threads", [0, 1, 4], ids=["default", "one", "four"])
def test_experts_with_and_without_copies_and_eviction(threads: int, random_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "outputs.json"
    done = _python(_RUNTIME, tmp_path, random_bundle, tmp_path / "prepacked", out, threads)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_bytes())
    assert threads or found["threads"] > 1
    manifest = load_manifest(random_bundle)
    ids = [entry.id for entry in manifest.experts[:3]]
    here = ExpertRuntime(random_bundle, manifest, ids)
    expected = [here.run(id, probe_input(manifest.dims.hidden, 2)).copy() for id in ids]
    for outputs in found["outputs"]:
        for mine, other in zip(expected, outputs, strict=True):
            np.testing.assert_allclose(np.array(other, np.float32), mine, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [("--wire", "fp32", "--draft", "auto"), ("--wire", "fp16", "--draft", "ngram", "--prepacked")],
    ids=lambda options: " ".join(options),
)
def test_a_base_station_that_keeps_all_experts(options: tuple[str, ...], random_bundle: Path, tmp_path: Path) -> None:
    more = [tmp_path / "prepacked"] if "--prepacked" in options else []
    done = _python(
        _STATION, tmp_path, "generate", "--bundle", random_bundle, "--resident", "100M", "--nodes-timeout", 60, "--raw",
        "--max-tokens", 4, *options, *more, "--prompt", "a",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "room for 8 of 8 experts here" in done.stderr
