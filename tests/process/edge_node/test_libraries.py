"""What libraries do besides their work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("module", ["edge_node.agent", "bs_coordinator.engine.speculation.draft_graph"])
def test_onnxruntime_keeps_no_telemetry(module: str, tmp_path: Path) -> None:
    """It would write a machine's id and its events below the home folder as soon as it is imported."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")
    }
    code = f"import {module}; from wire.onnx_session import session_options; session_options()"
    subprocess.run([sys.executable, "-c", code], env={**environment, "HOME": str(tmp_path)}, check=True, timeout=120)
    assert list(tmp_path.rglob("*onnxruntime*")) == []
