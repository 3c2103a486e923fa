"""Exports that are killed, interrupted or out of disk, as processes."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from exporter.bundle.bundle import export_bundle
from tests.conftest import Run
from tests.needs import skip_without
from tests.waiting import PATIENCE_S, wait_until
from wire.errors import BundleError
from wire.manifest import Quantisation, load_manifest

INT4 = Quantisation(scheme="int4", block=32)


JOURNAL = "export-state.jsonl"


@pytest.fixture
def running(mixtral: Callable[..., Path], tmp_path: Path) -> Iterator[Callable[[int], subprocess.Popen[str]]]:
    """`running(jobs)`: an export of many experts to tmp_path/out, caught after a few of them."""
    started: list[subprocess.Popen[str]] = []

    def start(jobs: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "exporter", "bundle", mixtral(layers=40), tmp_path / "out"]
        process = subprocess.Popen(
            [*map(str, command), "--jobs", str(jobs)],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        started.append(process)

        def has_begun() -> bool:
            assert process.poll() is None, process.communicate()[1]
            return finished_rows(tmp_path / "out") >= 5

        wait_until(has_begun, "five experts", poll_s=0.002)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def finished_rows(out: Path) -> int:
    """Experts in the journal."""
    try:
        return (out / JOURNAL).read_bytes().count(b"\n") - 1
    except FileNotFoundError:
        return 0


def assert_ended(processes: list[psutil.Process]) -> None:
    """All have ended; one without a parent that waits for it may stay a zombie."""
    _, alive = psutil.wait_procs(processes, timeout=PATIENCE_S)
    assert not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def assert_bundle_is_whole(out: Path, source: Path, scratch: Path) -> None:
    """`out` equals an export that nothing disturbed, file for file."""
    export_bundle(source, scratch, INT4, jobs=1)
    assert load_manifest(out) == load_manifest(scratch)
    for path in (p for folder in (out, scratch) for p in folder.rglob("*") if p.is_file()):
        assert (out / path.relative_to(out if out in path.parents else scratch)).exists()
    names = [sorted(str(p.relative_to(f)) for p in f.rglob("*")) for f in (out, scratch)]
    assert names[0] == names[1]


@pytest.mark.parametrize("jobs", [1, 2])
def test_resume_after_kill(
    jobs: int, running: Callable[[int], subprocess.Popen[str]], mixtral: Callable[..., Path], tmp_path: Path,
    run: Run,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    process = running(jobs)
    children = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    assert_ended(children)
    assert not (out / "manifest.json").exists()
    with (out / JOURNAL).open("a") as file:
        file.write('{"layer": 3, "exp')  # a row cut short
    (out / "experts/L00/.E0.onnx.1.tmp").write_bytes(b"left behind")
    kept = finished_rows(out)
    result = run("exporter", "bundle", mixtral(layers=40), out, "--jobs", jobs)
    assert result.returncode == 0, result.stderr
    assert f"kept {kept} experts" in result.stdout
    assert_bundle_is_whole(out, mixtral(layers=40), tmp_path / "scratch")


@pytest.mark.parametrize(("number", "jobs"), [(signal.SIGINT, 1), (signal.SIGINT, 2), (signal.SIGTERM, 2)])
def test_interrupt_ends_promptly(
    number: signal.Signals, jobs: int, running: Callable[[int], subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = running(jobs)
    children = psutil.Process(process.pid).children(recursive=True)
    if number == signal.SIGINT:  # a terminal sends it to the whole group
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "wdmoe-export: error: interrupted"
    assert "Traceback" not in stderr
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert not (tmp_path / "out/manifest.json").exists()
    assert_ended(children)


def test_dead_worker_is_reported(running: Callable[[int], subprocess.Popen[str]], tmp_path: Path) -> None:
    process = running(2)
    workers = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    assert workers
    workers[0].kill()
    _, stderr = process.communicate()
    assert process.returncode == 1
    assert "ended unexpectedly (exit code -9" in stderr.splitlines()[-1]
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_second_export_into_one_folder(
    running: Callable[[int], subprocess.Popen[str]], mixtral: Callable[..., Path], tmp_path: Path
) -> None:
    process = running(1)
    process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(BundleError, match="another export is writing"):
            export_bundle(mixtral(layers=40), tmp_path / "out", INT4, jobs=1)
    finally:
        process.send_signal(signal.SIGCONT)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    skip_without("mount")
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_too_little_space_is_reported_before_writing(mixtral: Callable[..., Path], small_disk: Path, run: Run) -> None:
    result = run("exporter", "bundle", mixtral(), small_disk / "out", "--quant", "fp32")
    assert result.returncode == 12
    assert "0.2 MiB free, the bundle needs 0.7 MiB" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (small_disk / "out").exists()


@pytest.mark.parametrize("jobs", [1, 2])
def test_disk_that_fills_up(jobs: int, mixtral: Callable[..., Path], small_disk: Path, tmp_path: Path) -> None:
    # The space check sees a disk that is larger than it is, as if another process filled it during the export.
    lie = (
        "import collections, shutil, sys\n"
        "if __name__ == '__main__':\n"
        "    shutil.disk_usage = lambda path: collections.namedtuple('U', 'free')(1 << 60)\n"
        "    from exporter.cli import main\n"
        "    main()\n"
    )
    script = tmp_path / "lie.py"
    script.write_text(lie)
    out = small_disk / "out"
    result = subprocess.run(
        [sys.executable, str(script), "bundle", str(mixtral()), str(out), "--quant", "fp32", "--jobs", str(jobs)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 12, result.stderr
    assert "No space left on device" in result.stderr
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if "error" in line]
    assert len(errors) == 1
    assert not (out / "manifest.json").exists()
    assert not list(small_disk.rglob("*.tmp"))
