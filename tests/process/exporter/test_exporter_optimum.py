"""The optimum backend, in the environment of its own that its pins ask for."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter.bundle.bundle import export_bundle
from exporter.expert.optimum_backend import choose_preset
from exporter.expert.probe import check_probe
from tests.checkpoints import HIDDEN
from tests.conftest import Run
from wire.manifest import Quantisation, load_manifest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def optimum_python() -> Path:
    """Python of an environment with the `optimum` extra; made once and kept."""
    folder = ROOT / ".venvs/optimum"
    python = folder / "bin/python"
    probe = [str(python), "-c", "import optimum.onnxruntime"]
    if not python.exists() or subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        # optimum asks for any torch; the same as in the main environment is downloaded already.
        command = [str(python), "-m", "pip", "install", "--quiet", "torch==2.13.0", "-e", ".[optimum]"]
        subprocess.run(command, cwd=ROOT, check=True)
    return python


def test_without_optimum_the_error_says_what_to_install(mixtral: Callable[..., Path], tmp_path: Path, run: Run) -> None:
    result = run("exporter", "bundle", mixtral(), tmp_path / "out", "--via", "optimum")
    assert result.returncode == 1
    assert "pip install -e .[optimum]" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_export_needs_none_of_what_the_environment_for_optimum_lacks() -> None:
    blocked = "import sys; sys.modules['cryptography'] = None; import exporter.bundle.bundle, exporter.cli"
    done = subprocess.run([sys.executable, "-c", blocked], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_arm_devices_get_the_arm_preset() -> None:
    assert {choose_preset(device) for device in ("pi4", "pi5", "jetson-orin", "generic-arm64")} == {"arm64"}


@pytest.mark.slow
@pytest.mark.parametrize(("device", "preset"), [("pi4", "arm64"), ("x86", choose_preset("x86"))])
def test_export_with_optimum(
    device: str, preset: str, mixtral: Callable[..., Path], tmp_path: Path, optimum_python: Path
) -> None:
    out = tmp_path / "out"
    command = [optimum_python, "-m", "exporter", "bundle", mixtral(), out, "--via", "optimum", "--device", device]
    result = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    manifest = load_manifest(out)
    assert manifest.quantisation == Quantisation(scheme="int8-dynamic", backend="optimum")
    assert manifest.tools["optimum-onnx"] == f"0.1.0 ({preset})"
    assert not list(out.rglob(".*"))
    ours = export_bundle(mixtral(), tmp_path / "direct", Quantisation(scheme="int8-dynamic"), jobs=1).manifest
    for entry, direct in zip(manifest.experts, ours.experts, strict=True):
        assert entry.error < 0.05
        assert entry.source_sha256 == direct.source_sha256
        check_probe(out, entry, HIDDEN, manifest.probe_tolerance)
