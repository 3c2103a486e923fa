"""A command that brings a network up, ended by a signal: as after Ctrl-C, the network is gone."""

from collections.abc import Callable
from pathlib import Path

from testbed.network.emulated import leftovers
from testbed.network.state import ROOT
from tests.interrupted import assert_clean_end, children_of, running_command
from tests.needs import needs
from tests.waiting import wait_until
from wire.manifest import Scheme

pytestmark = needs("mosquitto", network=True)


def test_versus_leaves_no_network_and_no_processes(tiny_bundle: Callable[[Scheme], Path], tmp_path: Path) -> None:
    arguments = (
        "versus", "--bundle", tiny_bundle("int4"), "--arm", "ours", "--rtt-ms", "5", "--channel", "dedicated",
        "--devices", "2", "--prompts", "1", "--out", tmp_path / "out",
    )  # fmt: skip
    with running_command(tmp_path, *arguments) as process:
        network = f"bench{process.pid}"
        wait_until(lambda: sum("edge_node" in child.cmdline() for child in children_of(process)) == 2, "two nodes")
        assert network in leftovers()
        children = children_of(process)
        process.terminate()
        assert_clean_end(process, children, tmp_path)
    assert network not in leftovers()
    assert not (ROOT / f"{network}.lock").exists()
