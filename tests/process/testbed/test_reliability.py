"""Nodes and brokers that go away in mid-answer: real processes, real signals; the text stays the same or says so."""

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from bs_coordinator.broker.processes import free_port, open_broker
from testbed.local_nodes import LocalNodes
from tests.needs import skip_without
from wire.manifest import Scheme

pytestmark = pytest.mark.slow
TOKENS = 160
"""Of the two-layer model: a few seconds."""


def _argv(fleet: LocalNodes, *extra: object) -> list[str]:
    return [
        sys.executable, "-m", "bs_coordinator", "generate", "--bundle", str(fleet.bundle), "--broker",
        str(fleet.address), "--cluster", fleet.cluster, "--prompt", "Hello", "--raw", "--wire", "fp32",
        "--max-tokens", str(TOKENS), *map(str, extra),
    ]  # fmt: skip


def _undisturbed(fleet: LocalNodes) -> str:
    done = subprocess.run(_argv(fleet), capture_output=True, text=True, check=True)
    assert f"{TOKENS} tokens" in done.stderr
    return done.stdout


def _disturbed(fleet: LocalNodes, fault: Callable[[], None], *extra: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of an answer during which, after its first characters, `fault` happens."""
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(_argv(fleet, *extra), stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        assert process.stdout is not None
        out = process.stdout.read(20)
        fault()
        out += process.stdout.read()
        code = process.wait()
        log.seek(0)
        err = log.read()
    assert "Traceback" not in err
    return code, out, err


@pytest.fixture
def pairs(fleet: LocalNodes) -> LocalNodes:
    """Every expert on two of four nodes."""
    for k in range(4):
        fleet.start(f"n{k}", f"L*:E{2 * k},{2 * k + 1},{(2 * k + 2) % 8},{(2 * k + 3) % 8}")
    return fleet


def test_a_killed_node_with_replicas_does_not_change_the_answer(pairs: LocalNodes) -> None:
    expected = _undisturbed(pairs)
    code, out, err = _disturbed(pairs, pairs.processes["n1"].kill)
    assert code == 0, err
    assert out == expected
    assert "degraded" not in err


def test_a_stopped_node_is_left_out_and_comes_back(pairs: LocalNodes) -> None:
    expected = _undisturbed(pairs)
    process = pairs.processes["n2"]
    err = ""
    # On a busy machine the other holders of its experts may look faster: a whole answer may do without the node.
    for _ in range(5):
        if "'n2' is left out" in err:
            break
        code, out, err = _disturbed(pairs, lambda: process.send_signal(signal.SIGSTOP))
        process.send_signal(signal.SIGCONT)
        assert code == 0, err
        assert out == expected
        assert "degraded" not in err
    assert "'n2' is left out" in err
    # Without its neighbours it is the only holder of four experts.
    for neighbour in (pairs.processes["n1"], pairs.processes["n3"]):
        neighbour.kill()
        neighbour.wait()
    assert _undisturbed(pairs) == expected


def test_without_replicas_the_answer_continues_and_is_marked_as_degraded(fleet: LocalNodes) -> None:
    for k in range(4):
        fleet.start(f"n{k}", f"L*:E{2 * k},{2 * k + 1}")
    code, out, err = _disturbed(fleet, fleet.processes["n1"].kill)
    assert code == 0, err
    assert f"{TOKENS} tokens" in err
    assert f"of {TOKENS} tokens were computed without some expert" in err
    assert out.strip()


@pytest.fixture
def restartable(tmp_path: Path, tiny_bundle: Callable[[Scheme], Path]) -> Iterator[tuple[LocalNodes, ExitStack]]:
    """A fleet, and its broker, which ends when the stack is closed."""
    skip_without("mosquitto")
    port = free_port()
    with ExitStack() as broker:
        address = broker.enter_context(open_broker("mosquitto", port=port))
        fleet = LocalNodes(tiny_bundle("fp32"), address, tmp_path)
        for k in range(4):
            fleet.start(f"n{k}", f"L*:E{2 * k},{2 * k + 1}")
        yield fleet, broker
        fleet.stop()


@pytest.mark.parametrize("down_s", [0.0, 6.0])
def test_a_broker_restart_in_mid_answer(restartable: tuple[LocalNodes, ExitStack], down_s: float) -> None:
    fleet, broker = restartable
    expected = _undisturbed(fleet)
    with ExitStack() as second:

        def restart() -> None:
            broker.close()
            time.sleep(down_s)
            second.enter_context(open_broker("mosquitto", port=fleet.address.port))

        code, out, err = _disturbed(fleet, restart)
    assert code == 0, err
    assert out == expected
    assert "the broker is back, 4 nodes are online" in err
    fleet.check()


def test_a_killed_base_station_continues_where_it_ended(pairs: LocalNodes, tmp_path: Path) -> None:
    session = tmp_path / "answer.session"
    sampled = ("--temperature", 1.0, "--seed", 3, "--session")
    whole = subprocess.run(_argv(pairs, *sampled, tmp_path / "whole"), capture_output=True, text=True, check=True)
    argv = _argv(pairs, *sampled, session)
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.read(20)
        process.kill()
    assert session.stat().st_mode & 0o777 == 0o600
    for _ in range(2):  # the second time there is nothing left to do
        again = subprocess.run(argv, capture_output=True, text=True, check=True)
        assert again.stdout == whole.stdout
    other = subprocess.run(_argv(pairs, "--session", session), capture_output=True, text=True, check=False)
    assert other.returncode == 12
    assert "another temperature, seed" in other.stderr
