"""What the tests share: a real broker, the demo model cut to two layers, its bundles, real node processes."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from bs_coordinator.broker.processes import open_broker
from testbed.demo_assets import demo_model, export_demo_bundle
from testbed.local_nodes import LocalNodes
from tests.checkpoints import save_mixtral
from wire.broker_url import BrokerAddress
from wire.manifest import Scheme

Run = Callable[..., subprocess.CompletedProcess[str]]


def pytest_configure() -> None:
    """Let Ctrl-C through: a shell's background jobs ignore it, and so would the processes that tests start.

    No example has a deadline: on a busy machine each of them may have to wait for a core.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    settings.register_profile("patient", deadline=None)
    settings.load_profile("patient")


@pytest.fixture(scope="session")
def broker() -> Iterator[BrokerAddress]:
    """A broker in a process of its own: mosquitto, as in the field, where it is installed."""
    installed = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
    with open_broker("mosquitto" if installed else "embedded") as address:
        yield address


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The demo model's first two layers, a Hugging Face folder."""
    return demo_model(layers=2)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Scheme], Path]:
    """Bundles of the two-layer model, made once per scheme."""
    made: dict[Scheme, Path] = {}

    def get(scheme: Scheme) -> Path:
        if scheme not in made:
            made[scheme] = tmp_path_factory.mktemp("bundles") / scheme
            export_demo_bundle(tiny_model, made[scheme], scheme)
        return made[scheme]

    return get


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
    """An empty fleet on the shared broker, in a cluster of the test's own; fp32 unless told otherwise."""
    scheme: Scheme = getattr(request, "param", "fp32")
    cluster = f"t-{abs(hash(request.node.nodeid)) % 10**12}"
    fleet = LocalNodes(tiny_bundle(scheme), broker, tmp_path / "nodes", cluster=cluster)
    yield fleet
    fleet.stop()


@pytest.fixture(scope="session")
def run() -> Run:
    """Run a command of ours in a process of its own, as a user would."""

    def run(room: str, *args: object, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", room, *map(str, args)]
        kwargs.setdefault("timeout", 120)
        if "input" not in kwargs:
            kwargs["stdin"] = subprocess.DEVNULL
        done: subprocess.CompletedProcess[str] = subprocess.run(
            argv, capture_output=True, text=True, check=False, **kwargs
        )
        return done

    return run
