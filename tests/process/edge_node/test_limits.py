"""A device beyond its limits takes no work, publishes why, and comes back; systemd gets its messages."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from edge_node.limits import DeviceLimits
from testbed.local_nodes import LocalNodes
from tests.waiting import wait_until
from wire import status
from wire.topics import Topics
from wire.transport import Transport
from wire.transports import connect


def test_a_hot_device_takes_work_again_only_after_cooling_down() -> None:
    celsius: list[float | None] = [80.0]
    limits = DeviceLimits(max_celsius=85, read_celsius=lambda: celsius[0])
    for reading, fit in [(80, True), (86, False), (83, False), (80, True), (84, True), (None, True)]:
        celsius[0] = reading
        assert (limits.unfit() == "") is fit, reading
    celsius[0] = 90
    assert "90 °C" in limits.unfit()


def test_free_memory_needs_a_margin_before_work_is_taken_again() -> None:
    available = [200 << 20]
    limits = DeviceLimits(min_available_bytes=100 << 20, read_available_bytes=lambda: available[0])
    for mebibytes, fit in [(200, True), (99, False), (110, False), (126, True), (101, True)]:
        available[0] = mebibytes << 20
        assert (limits.unfit() == "") is fit, mebibytes


def test_a_node_short_of_memory_goes_offline_and_gives_the_reason(fleet: LocalNodes) -> None:
    argv = _argv(fleet, "--min-free-memory", "900T")
    with closing(connect(fleet.address, "t-watch")) as watch:
        watch.subscribe(Topics(fleet.cluster).status("n0"), qos=1)
        process = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
        try:
            seen = _statuses(watch, lambda s: s.state == "offline")
        finally:
            process.terminate()
            process.wait()
    assert seen[0].online
    assert "short of memory" in seen[-1].reason


def test_systemd_gets_readiness_and_watchdog_messages(
    fleet: LocalNodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifications:
        notifications.bind(str(tmp_path / "n"))
        process = subprocess.Popen(
            _argv(fleet), stderr=subprocess.DEVNULL, env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "n")}
        )
        try:
            assert [notifications.recv(100), notifications.recv(100), notifications.recv(100)] == [
                b"READY=1",
                b"WATCHDOG=1",
                b"WATCHDOG=1",
            ]
            process.send_signal(signal.SIGSTOP)  # hangs: no message follows, and systemd would end it
            notifications.settimeout(5)
            with pytest.raises(TimeoutError):
                notifications.recv(100)
        finally:
            process.kill()
            process.wait()


def _argv(fleet: LocalNodes, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "edge_node", "--bundle", str(fleet.bundle), "--broker", str(fleet.address), "--id", "n0",
        "--experts", "L0:E0", "--cluster", fleet.cluster, *more,
    ]  # fmt: skip


def _statuses(watch: Transport, until: Callable[[status.NodeStatus], bool]) -> list[status.NodeStatus]:
    seen: list[status.NodeStatus] = []

    def arrived() -> bool:
        if message := watch.receive(1.0):
            seen.append(status.decode_status(message.payload, "n0"))
        return bool(seen) and until(seen[-1])

    wait_until(arrived, "a status of n0", poll_s=0)
    return seen
