"""A node installs from wheels into an environment of its own, without torch, and serves."""

import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.test_docs import documented_names
from wire.manifest import Scheme

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_a_node_needs_no_torch(tiny_bundle: Callable[[Scheme], Path], tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", f"{ROOT}[edge]"], check=True)
    listed = subprocess.run([python, "-m", "pip", "list"], check=True, capture_output=True, text=True).stdout
    assert "wdmoe" in listed
    assert not {"torch", "transformers", "onnx"} & {line.split()[0] for line in listed.splitlines() if line}
    # A broker that is not there: everything else (imports, hashes, sessions, probes) has worked by then.
    node = [str(tmp_path / "venv/bin/wdmoe-node"), "--bundle", str(tiny_bundle("int4"))]
    node += ["--id", "a", "--experts", "L*:E0"]
    done = subprocess.run(
        [*node, "--broker", "mqtt://127.0.0.1:1"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 30, done.stderr
    assert "proved 2 experts" in done.stderr
    assert sys.prefix not in done.stderr
    missing = "import importlib.util as i; print([i.find_spec(f'testbed.{r}') is None for r in ('bench', 'proof')])"
    found = subprocess.run([python, "-c", missing], check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert found.strip() == "[False, True]"
    names = "import importlib.metadata as m; print(*{file.parts[0] for file in m.files('wdmoe')})"
    found = subprocess.run([python, "-c", names], check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert {name for name in found.split() if name != ".." and not name.endswith(".dist-info")} == documented_names()
