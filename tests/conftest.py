"""What the tests share: a real broker, the demo model cut to two layers, its bundles, real node processes."""

import contextlib
import os
import signal
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings

import edge_node.experts.runtime as experts_runtime
from bs_coordinator.broker.processes import mosquitto_path, open_broker
from testbed.demo_assets import demo_model, export_demo_bundle
from testbed.local_nodes import LocalNodes
from tests.checkpoints import save_mixtral
from tests.in_process import run_in_process
from tests.needs import missing_packages
from wire.broker_address import BrokerAddress
from wire.manifest import Scheme

Run = Callable[..., subprocess.CompletedProcess[str]]


def pytest_configure() -> None:
    """Settings of every run.

    SIGINT gets Python's handler, as a shell's background jobs ignore it, and so would the processes that tests start.
    Hypothesis' examples have no deadline and may be slow to make: on a busy machine they may have to wait for a core.
    Sessions of onnxruntime share no pool of threads: all later sessions of the process, those of the exporter included,
    would have to use it.
    Torch uses one thread: with several, tests' small products wait for descheduled threads, which on a busy machine
    takes ten times as long as the work.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
    experts_runtime.share_thread_pool = lambda threads: None  # type: ignore[attr-defined]
    settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("patient")
    # `--hypothesis-profile=fuzz` takes its place.
    settings.register_profile(
        "fuzz", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=100_000, print_blob=True
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line about tests that were skipped for want of system packages, with the command that installs them."""
    reports = terminalreporter.getreports("skipped")
    count, packages = missing_packages(str(report.longrepr) for report in reports)
    if count:
        terminalreporter.write_line(f"skipped {count} tests: apt-get install {' '.join(packages)}", yellow=True)


@pytest.fixture(scope="session")
def broker() -> Iterator[BrokerAddress]:
    """A broker in a process of its own: mosquitto, as in the field, where it is installed."""
    with open_broker("mosquitto" if mosquitto_path() else "embedded") as address:
        yield address


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the parallel workers of one run share, for fixtures that take long to make."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def tiny_model(shared_folder: Path) -> Path:
    """The demo model's first two layers, a Hugging Face folder."""
    with FileLock(shared_folder / "tiny-model.lock"):
        return demo_model(layers=2)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model: Path, shared_folder: Path) -> Callable[[Scheme], Path]:
    """Bundles of the two-layer model, made once per scheme."""

    def get(scheme: Scheme) -> Path:
        folder = shared_folder / f"bundle-{scheme}"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                export_demo_bundle(tiny_model, partial := Path(f"{folder}.partial"), scheme)
                partial.rename(folder)
        return folder

    return get


@pytest.fixture(scope="session")
def random_bundle(shared_folder: Path) -> Path:
    """An int4 bundle of a random model, a thousand times smaller than the demo: two layers of four experts."""
    folder = shared_folder / "bundle-random"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            checkpoint, partial = shared_folder / "checkpoint-random", shared_folder / "bundle-random.partial"
            save_mixtral(checkpoint, "float32", positions=512)
            export_demo_bundle(checkpoint, partial, "int4")
            partial.rename(folder)
    return folder


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`mixtral(dtype, shard_size)`: a random checkpoint folder, saved once per kind."""
    made: dict[tuple[object, ...], Path] = {}

    def get(dtype: str = "bfloat16", shard_size: str = "1GB", layers: int = 2) -> Path:
        key = (dtype, shard_size, layers)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("checkpoints") / f"mixtral-{dtype}"
            save_mixtral(made[key], dtype, shard_size=shard_size, layers=layers)
        return made[key]

    return get


@pytest.fixture
def fleet(
    broker: BrokerAddress,
    tiny_bundle: Callable[[Scheme], Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> Iterator[LocalNodes]:
    """An empty fleet on the shared broker, in a cluster of the test's own; fp32 by default."""
    scheme: Scheme = getattr(request, "param", "fp32")
    cluster = f"t-{zlib.crc32(request.node.nodeid.encode())}"
    fleet = LocalNodes(tiny_bundle(scheme), broker, tmp_path / "nodes", cluster=cluster)
    yield fleet
    fleet.stop()


@pytest.fixture(scope="session")
def run(run_process: Run) -> Run:
    """Run a command of ours in this process, which saves the seconds that importing its libraries takes.

    Nodes run in processes of their own: they replace onnxruntime's thread pools for all that is loaded afterwards.
    """

    def run(package: str, *args: object, cwd: Path | None = None, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        if package == "edge_node":
            return run_process(package, *args, cwd=cwd, **kwargs)
        with contextlib.chdir(cwd or "."), warnings.catch_warnings():
            warnings.simplefilter("default")  # as in a process: shown, and no errors
            return run_in_process(package, *args, **kwargs)

    return run


@pytest.fixture(scope="session")
def run_process() -> Run:
    """Run a command of ours in a process of its own, as a user would."""

    def run(package: str, *args: object, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", package, *map(str, args)]
        if "input" not in kwargs:
            kwargs["stdin"] = subprocess.DEVNULL
        done: subprocess.CompletedProcess[str] = subprocess.run(
            argv, capture_output=True, text=True, check=False, **kwargs
        )
        return done

    return run
