"""The demo's bundle, made by several commands at once."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from wire.manifest import load_manifest

_EXPORT = """
import sys
from pathlib import Path
from testbed.demo_assets import export_demo_bundle

if __name__ == "__main__":
    export_demo_bundle(Path(sys.argv[1]), Path(sys.argv[2]), "int4")
"""


def test_demos_that_start_at_once_wait_for_one_bundle(mixtral: Callable[..., Path], tmp_path: Path) -> None:
    script = tmp_path / "export.py"
    script.write_text(_EXPORT)
    out = tmp_path / "bundles" / "out"
    demos = [
        subprocess.Popen([sys.executable, script, mixtral(), out], stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    assert [(demo.communicate(timeout=300)[1], demo.returncode) for demo in demos] == [("", 0)] * 3
    assert load_manifest(out).experts
