"""Commands that start processes, ended by a signal: as after Ctrl-C, nothing is left."""

import signal
from pathlib import Path

import pytest

from bs_coordinator.broker.processes import free_port
from tests.interrupted import assert_clean_end, children_of, running_command
from tests.waiting import wait_until


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_benchmark_leaves_no_processes_or_files(number: signal.Signals, tmp_path: Path) -> None:
    arguments = ("bench", "--section", "transport", "--broker", "embedded", "--out", tmp_path / "bench.json")
    with running_command(tmp_path, *arguments) as process:
        wait_until(lambda: len(children_of(process)) >= 3, "broker and echoes")
        children = children_of(process)
        process.send_signal(number)
        assert_clean_end(process, children, tmp_path)


def test_a_fleet_that_is_starting_leaves_no_processes(random_bundle: Path, tmp_path: Path) -> None:
    arguments = ("up", "--bundle", random_bundle, "--nodes", 2, "--port", free_port(), "--runs", tmp_path / "runs")
    with running_command(tmp_path, *arguments) as process:
        wait_until(lambda: sum("edge_node" in child.cmdline() for child in children_of(process)), "a node", poll_s=0.01)
        children = children_of(process)
        process.terminate()
        assert_clean_end(process, children, tmp_path)
