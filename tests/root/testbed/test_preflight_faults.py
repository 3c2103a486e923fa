"""Preflight on an emulated network with running nodes: every planted fault is found, and only that one."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from bs_coordinator.broker.processes import mosquitto_path, open_broker, stop_child
from testbed.local_nodes import LocalNodes
from testbed.network.daemon import BASE_STATION
from testbed.network.emulated import EmulatedNetwork, down, leftovers, up
from testbed.network.namespaces import inside, namespace
from tests.needs import needs
from tests.waiting import wait_until
from wire.broker_address import BrokerAddress
from wire.manifest import Scheme
from wire.status import NodeStatus, decode_status
from wire.telemetry import Wifi, decode_telemetry
from wire.topics import Topics
from wire.transports import connect

NAME = f"p{os.getpid()}"
NETWORK = f"""
name: {NAME}
nodes: [well, slow, late, bent, twin, full, sleepy]
subnet: 10.83.0.0/24
profiles:
  faults:
    default: {{down_mbps: 50, up_mbps: 50, delay_ms: 1}}
    nodes: {{slow: {{down_mbps: 1, up_mbps: 1}}}}
"""
# As `iw` prints it; power saving is what a Raspberry Pi comes with.
IW = """#!/bin/sh
case "$*" in
  *"get power_save"*) echo "Power save: on" ;;
  *link*) printf 'Connected to 02:00:00:aa:bb:cc (on wifi0)\\n\\tSSID: shelf\\n\\tfreq: 5180\\n\\tsignal: -52 dBm\\n' ;;
  *"station dump"*) printf 'Station 02:00:00:aa:bb:cc (on wifi0)\\n\\tsignal:  \\t-52 dBm\\n' ;;
esac
"""
FAULTS = {
    "slow": "link", "late": "clock", "bent": "online", "twin": "id", "full": "disk", "sleepy": "power save",
}  # fmt: skip
WORDS = {
    "slow": "the limit is 2", "late": "+9", "bent": "SHA-256", "twin": "a second process tried to use this id",
    "full": "MiB free", "sleepy": "on, which adds up to 100 ms",
}  # fmt: skip


pytestmark = [pytest.mark.slow, needs("faketime", "iperf3", "unshare", "mount", "mosquitto", network=True)]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedNetwork]:
    path = tmp_path_factory.mktemp("network") / "net.yaml"
    path.write_text(NETWORK)
    yield up(path)
    if NAME in leftovers():
        down(NAME)


def _preflight(network: EmulatedNetwork, plan: Path, out: Path) -> tuple[int, list[dict[str, Any]]]:
    argv = [*network.bs_prefix(), sys.executable, "-m", "testbed", "preflight", str(plan), "--out", str(out), "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout)


def _plan(path: Path, broker: str, bundle: Path, nodes: list[str]) -> Path:
    named = ", ".join(f"{node}: ''" for node in nodes)
    path.write_text(
        f"{{name: shelf, network: {{external: {{broker: '{broker}', allow_plaintext: true}}}}, bundles: [{bundle}], "
        f"nodes: {{{named}}}, limits: {{least_disk_mib: 16, least_mbps: 2}}, policies: [topk], "
        "workloads: [{kind: generate}]}"
    )
    return path


def _wait_until_settled(address: BrokerAddress) -> None:
    """Wait until all nodes have said what preflight is to find out: it listens to them for a few seconds only."""
    topics = Topics("default")
    statuses: dict[str, NodeStatus] = {}
    radios: dict[str, Wifi | None] = {}

    def settled() -> bool:
        message = transport.receive(0.1)
        if message and (node := topics.node_of_status(message.topic)):
            seen = decode_status(message.payload, node)
            if not seen.refused:
                statuses[node] = seen
        elif message and (node := topics.node_of_telemetry(message.topic)):
            radios[node] = decode_telemetry(message.payload, node).wifi
        online = {node for node, seen in statuses.items() if seen.online}
        sleepy = radios.get("sleepy")
        return (
            online == {"well", "slow", "late", "twin", "full", "sleepy"}
            and "bent" in statuses
            and bool(statuses["twin"].rival)
            and sleepy is not None
            and sleepy.connected
            and sleepy.power_save is True
        )

    with closing(connect(address, "settled")) as transport:
        for topic in (topics.status("+"), topics.telemetry("+")):
            transport.subscribe(topic)
        wait_until(settled, "all nodes", poll_s=0)


def test_every_planted_fault_is_found(
    network: EmulatedNetwork, tiny_bundle: Callable[[Scheme], Path], tmp_path: Path
) -> None:
    bundle = tiny_bundle("int4")
    bent, small = tmp_path / "bent", tmp_path / "small"
    shutil.copytree(bundle, bent)
    weights = sorted(bent.glob("experts/L00/E3.*"))[-1]
    changed = bytearray(weights.read_bytes())
    changed[len(changed) // 2] ^= 1
    weights.write_bytes(changed)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "iw").write_text(IW)
    (tools / "iw").chmod(0o755)
    small.mkdir()
    size = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
    with ExitStack() as stack:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size + (12 << 20)}", "none", small], check=True)
        stack.callback(subprocess.run, ["umount", "-l", str(small)], check=True)
        shutil.copytree(bundle, small / "bundle")
        stack.enter_context(inside(namespace(NAME, BASE_STATION)))
        address = stack.enter_context(open_broker("mosquitto", host=network.bs_address))
        prefixes = {
            # Only the wall clock is wrong, as on a board without a battery: by 90 to 99 s, however slow the probes are.
            "late": ["env", "FAKETIME_DONT_FAKE_MONOTONIC=1", "faketime", "-f", "+95s"],
            # /sys shows a radio, and the first `iw` on PATH says that it saves power.
            "sleepy": [
                "unshare", "--mount", "sh", "-c",
                "mount -t tmpfs none /sys/class/net && mkdir -p /sys/class/net/wifi0/phy80211 && "
                f'PATH="{tools}:$PATH" exec "$@"', "sh",
            ],
        }  # fmt: skip
        bundles = {"bent": bent, "full": small / "bundle"}
        for node in network.nodes:
            fleet = LocalNodes(bundles.get(node, bundle), address, tmp_path / "logs")
            stack.callback(fleet.stop)
            # nsenter first: what follows runs on the node.
            fleet.start(node, "L*:E*", prefix=[*network.prefix(node), *prefixes.get(node, ())])
            if node in ("well", "slow"):  # the others' links are judged by pings: iperf3 takes seconds
                argv = [*network.prefix(node), "iperf3", "--server"]
                server = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                stack.callback(stop_child, server)
        second = LocalNodes(bundle, address, tmp_path / "second")
        stack.callback(second.stop)
        wait_until(lambda: "serves" in (tmp_path / "logs" / "twin.log").read_text(), "the first twin")
        second.start("twin", "L*:E*", prefix=network.prefix("twin"))
        assert second.processes["twin"].wait() == 22
        _wait_until_settled(address)
        plan = _plan(tmp_path / "plan.yaml", str(address), bundle, list(network.nodes))
        code, checks = _preflight(network, plan, tmp_path)

    assert code == 62
    failed = {(check["node"], check["name"]): check["detail"] for check in checks if check["level"] == "fail"}
    assert {key for key in failed if key[0]} == set(FAULTS.items())
    for node, words in WORDS.items():
        assert words in failed[node, FAULTS[node]]
    # The node without a fault passes every check that could be made.
    assert {c["level"] for c in checks if c["node"] == "well"} <= {"pass", "unknown"}
    measured = next(c["detail"] for c in checks if (c["node"], c["name"]) == ("well", "link"))
    assert "iperf3" in measured


def test_a_broker_with_nagle_and_a_full_disk_are_found(
    network: EmulatedNetwork, tiny_bundle: Callable[[Scheme], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with ExitStack() as stack:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(out)], check=True)
        stack.callback(subprocess.run, ["umount", "-l", str(out)], check=True)
        config = tmp_path / "mosquitto.conf"
        config.write_text(f"listener 18830 {network.bs_address}\nuser root\nallow_anonymous true\n")
        log = stack.enter_context((tmp_path / "mosquitto.log").open("wb"))
        broker = subprocess.Popen(
            [*network.bs_prefix(), mosquitto_path() or "", "-c", str(config)], stdout=log, stderr=log
        )
        stack.callback(stop_child, broker)
        wait_until(lambda: "running" in (tmp_path / "mosquitto.log").read_text(), "mosquitto")
        plan = _plan(tmp_path / "plan.yaml", f"mqtt://{network.bs_address}:18830", tiny_bundle("int4"), ["well"])
        code, checks = _preflight(network, plan, out)
    assert code == 62
    failed = {(c["node"], c["name"]): c["detail"] for c in checks if c["level"] == "fail"}
    assert "without TCP_NODELAY" in failed["", "broker"]
    assert "MiB free" in failed["", "disk"]
    assert "no message from it" in failed["well", "online"]
