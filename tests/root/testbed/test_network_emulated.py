"""Real emulated networks: namespaces, TAPs, iperf3, ping. They need root; what others see is tested too."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from testbed.errors import NetworkError, PrivilegeError
from testbed.network.control import ask
from testbed.network.daemon import BASE_STATION
from testbed.network.emulated import EmulatedNetwork, attach, emulated
from testbed.network.namespaces import existing, forward_between_nodes, inside, namespace
from testbed.network.state import State
from tests.conftest import Run
from tests.needs import needs, skip_without
from tests.waiting import PATIENCE_S, wait_until

NAME = f"t{os.getpid()}"
SPEC = f"""
name: {NAME}
nodes: 3
profiles:
  calm:
    default: {{down_mbps: 40, up_mbps: 20, delay_ms: 3}}
  shared:
    shared_air: true
    default: {{down_mbps: 40, up_mbps: 40, delay_ms: 3}}
  lossy:
    default: {{down_mbps: 30, up_mbps: 30, delay_ms: 1, jitter_ms: 1, loss_percent: 3}}
  moving:
    default: {{down_mbps: 40, up_mbps: 40, delay_ms: 1}}
    events:
      - {{at_s: 0.5, nodes: [node0], set: {{down_mbps: 10}}}}
      - {{at_s: 0.5, for_s: 2.5, nodes: [node1], ramp_to: {{up_mbps: 15, delay_ms: 11}}}}
"""


needs_network = needs("iperf3", "ping", "ip", network=True)


@pytest.fixture
def spec(tmp_path: Path) -> Iterator[Path]:
    """The description of a network that is taken down whatever a test does."""
    path = tmp_path / "net.yaml"
    path.write_text(SPEC)
    yield path
    subprocess.run([sys.executable, "-m", "testbed", "net", "down", "--name", NAME], capture_output=True, check=False)


def _interfaces() -> object:
    links = json.loads(subprocess.run(["ip", "-j", "link"], capture_output=True, check=True).stdout)
    return [{key: link[key] for key in ("ifname", "mtu", "operstate", "address")} for link in links]


def _goodputs(network: EmulatedNetwork, nodes: list[str], *, reverse: bool = False) -> list[float]:
    """Mbit/s of iperf3 between the base station and these nodes at the same time."""

    def one(node: str) -> float:
        argv = [
            *network.bs_prefix(), "iperf3", "--json", "-c", network.node_address(node), "-t", "2", "-O", "0.5",
            "--connect-timeout", "500", *(["-R"] if reverse else []),
        ]  # fmt: skip

        def report() -> dict[str, Any] | None:
            found = json.loads(subprocess.run(argv, capture_output=True, check=False).stdout)
            return None if "error" in found else found

        with subprocess.Popen([*network.prefix(node), "iperf3", "-s", "-1"], stdout=subprocess.DEVNULL) as server:
            try:
                measured = wait_until(report, "iperf3")
            finally:
                server.kill()
        assert measured is not None
        return float(measured["end"]["sum_received"]["bits_per_second"]) / 1e6

    with ThreadPoolExecutor(len(nodes)) as pool:
        return list(pool.map(one, nodes))


@pytest.mark.slow
@needs_network
def test_iperf3_and_ping_see_what_is_configured(run: Run, spec: Path, tmp_path: Path) -> None:
    assert run("testbed", "net", "up", spec).returncode == 0
    out = tmp_path / "check.json"
    argv = ["net", "check", "--name", NAME, "--node", "node2", "--out", out]
    argv += [option for profile in ("calm", "lossy", "shared") for option in ("--profile", profile)]
    # A busy machine delays the relay: what is configured is seen in a quiet moment.
    wait_until(lambda: run("testbed", *argv).returncode == 0, "links to be as configured")
    rows = {row["profile"]: row for row in json.loads(out.read_text())}
    assert set(rows) == {"calm", "lossy", "shared"}
    assert rows["calm"]["down"]["measured_mbps"] == pytest.approx(40, rel=0.08)
    assert rows["calm"]["up"]["measured_mbps"] == pytest.approx(20, rel=0.08)
    assert rows["calm"]["measured_rtt_ms"] == pytest.approx(6, abs=0.7)
    # A round trip is lost when either way is: 5.9 % of 200, four standard deviations.
    assert rows["lossy"]["lost_percent"] == pytest.approx(5.9, abs=6.7)
    assert rows["lossy"]["lost_percent"] > 0


@needs_network
def test_check_finds_a_link_that_is_not_what_is_configured(run: Run, spec: Path) -> None:
    with emulated(spec) as network:
        shaper = ["tc", "qdisc", "add", "dev", "wifi0", "root", "tbf"]
        shaped = subprocess.run(
            [*network.prefix("node0"), *shaper, "rate", "5mbit", "burst", "10kb", "latency", "50ms"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if shaped.returncode:
            pytest.skip(f"this kernel has no tbf: {shaped.stderr}")
        done = run("testbed", "net", "check", "--name", NAME, "--node", "node0")
    assert done.returncode == NetworkError.exit_code
    assert "1 of 1 links differ by more than 8% or 0.7 ms from what is configured (calm node0)" in done.stderr


@needs_network
def test_air_times_add_up_on_shared_air_only(spec: Path) -> None:
    with emulated(spec) as network:

        def halves() -> bool:
            one, other = _goodputs(network, ["node0", "node1"])
            # Acknowledgements take air as well: 2 to 4 %.
            return 40 * 0.9 < one + other < 40 * 1.02 and one == pytest.approx(other, rel=0.2)

        # A busy machine delays the relay: what is configured is seen in a quiet moment.
        network.set_profile("shared")
        wait_until(halves, "both links to have half of the air each")
        network.set_profile("calm")
        wait_until(lambda: _goodputs(network, ["node0", "node1"]) == pytest.approx([40, 40], rel=0.08), "full rates")


@needs_network
def test_nodes_reach_only_the_base_station_unless_it_forwards(spec: Path) -> None:
    def pings(prefix: list[str], address: str) -> bool:
        argv = ["ping", "-n", "-q", "-c", "2", "-i", "0.1", "-W", "1", address]
        return subprocess.run([*prefix, *argv], capture_output=True, check=False).returncode == 0

    with emulated(spec) as network:
        assert pings(network.prefix("node0"), network.bs_address)
        assert pings(network.bs_prefix(), network.node_address("node2"))
        assert not pings(network.prefix("node0"), network.node_address("node1"))
        full = [*network.bs_prefix(), "ping", "-n", "-q", "-c", "2", "-s", "4000", network.node_address("node0")]
        assert subprocess.run(full, capture_output=True, check=False).returncode == 0
        arp = subprocess.run([*network.bs_prefix(), "ip", "neigh"], capture_output=True, text=True, check=True).stdout
        assert re.search(r"10\.77\.0\.2 dev wifi0 lladdr 02:57:44:4d:00:01", arp)
        with inside(namespace(NAME, BASE_STATION)):
            forward_between_nodes()
        # The first answer to a node's search for its peer comes after up to a second.
        wait_until(lambda: pings(network.prefix("node0"), network.node_address("node1")), "a node to reach its peer")


@needs_network
def test_profiles_move_links_and_the_truth_is_written(spec: Path) -> None:
    with emulated(spec) as network:
        seen: list[dict[tuple[str, str], float]] = []

        def at_its_end() -> bool:
            seen.append({(node, quantity): value for node, quantity, value in network.truth()})
            return seen[-1]["node1", "up_mbps"] == 15

        began = time.time()
        network.set_profile("moving")
        wait_until(at_its_end, "the end of the ramp")
        wait_until(lambda: '"up_mbps":15' in network.truth_path.read_text().replace(" ", ""), "its line in the log")
        lines = [json.loads(line) for line in network.truth_path.read_text().splitlines()]
        (now, *_), last = [values for values in seen if 15 < values["node1", "up_mbps"] < 40], seen[-1]
    assert now["node0", "down_mbps"] == 10
    assert now["node0", "up_mbps"] == 40
    # Rate and delay move together: 25 Mbit/s down while 10 ms up.
    assert (40 - now["node1", "up_mbps"]) / 25 == pytest.approx((now["node1", "delay_ms"] - 1) / 10)
    assert (last["node1", "up_mbps"], last["node1", "delay_ms"]) == (15, 11)
    assert set(lines[0]) == {
        "time", "node", "profile", "down_mbps", "up_mbps", "delay_ms", "jitter_ms", "loss_percent",
    }  # fmt: skip
    moving = [line for line in lines if line["profile"] == "moving"]
    step = [line for line in moving if line["node"] == "node0" and line["down_mbps"] == 10]
    assert len(step) == 1
    assert step[0]["time"] - began >= 0.5
    ramp = [line["up_mbps"] for line in moving if line["node"] == "node1"]
    assert ramp == sorted(ramp, reverse=True)
    assert ramp[0] == 40
    assert ramp[-1] == 15
    assert len(ramp) <= 6


@needs_network
def test_up_and_down_clean_up_after_kill_9(run: Run, spec: Path) -> None:
    before = _interfaces()
    foreign = f"other-{NAME}"
    subprocess.run(["ip", "netns", "add", foreign], check=True)
    try:
        for cleaner in ("up", "down"):
            assert run("testbed", "net", "up", spec).returncode == 0
            assert len(existing()[NAME]) == 4
            relay = State(NAME).relay()
            assert relay is not None
            relay.send_signal(signal.SIGKILL)
            psutil.wait_procs([relay], timeout=PATIENCE_S)
            crashed = run("testbed", "net", "status", "--name", NAME)
            assert crashed.returncode == NetworkError.exit_code
            assert f"'{NAME}' has crashed" in crashed.stderr
            if cleaner == "up":
                assert run("testbed", "net", "up", spec).returncode == 0
                with_new_relay = run("testbed", "net", "status", "--name", NAME, "--json")
                assert json.loads(with_new_relay.stdout)["pid"] != relay.pid
            assert run("testbed", "net", "down", "--name", NAME).returncode == 0
            assert NAME not in existing()
            assert not State(NAME).folder.exists()
        names = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
        assert foreign in names
        assert _interfaces() == before
    finally:
        subprocess.run(["ip", "netns", "del", foreign], check=True)


@needs_network
def test_a_network_ends_with_a_process_that_is_killed(spec: Path) -> None:
    code = (
        "import sys, time, pathlib\n"
        "from testbed.network.emulated import emulated\n"
        "with emulated(pathlib.Path(sys.argv[1])):\n    print('up', flush=True)\n    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, spec], stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout is not None
            assert owner.stdout.readline() == "up\n"
            relay = State(NAME).relay()
            assert relay is not None
            assert NAME in existing()
        finally:
            owner.kill()
    assert not psutil.wait_procs([relay], timeout=PATIENCE_S)[1]
    assert NAME not in existing()
    assert not State(NAME).folder.exists()


@needs_network
def test_down_removes_only_the_named_network(run: Run, spec: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.yaml"
    second.write_text(SPEC.replace(f"name: {NAME}", f"name: {NAME}b"))
    try:
        assert run("testbed", "net", "up", spec).returncode == 0
        assert run("testbed", "net", "up", second).returncode == 0
        refused = run("testbed", "net", "down")
        assert refused.returncode == NetworkError.exit_code
        assert "several networks are up, choose one with --name, or --all" in refused.stderr
        assert all(name in refused.stderr for name in (NAME, f"{NAME}b"))
        assert {NAME, f"{NAME}b"} <= {*existing()}
    finally:
        done = run("testbed", "net", "down", "--name", f"{NAME}b")
    assert done.returncode == 0, done.stderr
    assert NAME in existing()
    assert f"{NAME}b" not in existing()


@needs_network
def test_a_recycled_process_number_is_not_killed(run: Run, spec: Path) -> None:
    assert run("testbed", "net", "up", spec).returncode == 0
    relay = State(NAME).relay()
    assert relay is not None
    relay.send_signal(signal.SIGKILL)
    psutil.wait_procs([relay], timeout=PATIENCE_S)
    with subprocess.Popen(["sleep", "60"]) as bystander:
        pid_file = State(NAME).folder / "relay.pid"
        noted = json.loads(pid_file.read_bytes())
        pid_file.write_text(json.dumps({**noted, "pid": bystander.pid}))
        assert run("testbed", "net", "down", "--name", NAME).returncode == 0
        assert bystander.poll() is None
        bystander.kill()


@needs_network
def test_a_running_network_is_shared_by_processes_in_its_namespaces(run: Run, spec: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from testbed.network.emulated import attach\n"
        "network = attach(Path(sys.argv[1])); network.set_profile('shared'); print(len(network.truth()))"
    )
    with emulated(spec) as network:
        again = run("testbed", "net", "up", spec)
        assert again.returncode == NetworkError.exit_code
        assert "already up" in again.stderr
        for prefix in (network.bs_prefix(), network.prefix("node1")):
            done = subprocess.run(
                [*prefix, sys.executable, "-c", script, str(spec)], capture_output=True, text=True, check=False
            )
            assert (done.stdout, done.stderr) == ("15\n", "")
        assert network.status().profile == "shared"
        other = tmp_path / "other.yaml"
        other.write_text(SPEC.replace("delay_ms: 3", "delay_ms: 4"))
        with pytest.raises(NetworkError, match="another description"):
            attach(other)
        with pytest.raises(NetworkError, match="no profile 'x', only calm, shared"):
            network.set_profile("x")
        with pytest.raises(NetworkError, match="no node 'x', only node0"):
            network.prefix("x")
        listed = run("testbed", "net", "status", "--name", NAME)
        assert "shared" in listed.stdout
        assert network.node_address("node2") in listed.stdout
    with pytest.raises(NetworkError, match="is not up"):
        attach(spec)


@needs_network
def test_the_control_socket_survives_misbehaving_clients(spec: Path) -> None:
    @contextlib.contextmanager
    def connected(path: Path) -> Iterator[socket.socket]:
        with socket.socket(socket.AF_UNIX) as client:
            # With a timeout the kernel would not let us wait for our turn to be accepted.
            client.connect(str(path))
            client.settimeout(5)
            yield client

    def answers() -> bool:
        try:
            return network.status().profile == "calm"
        except NetworkError:
            return False

    with emulated(spec) as network:
        path = State(NAME).control
        assert path.stat().st_mode & 0o777 == 0o600
        for garbage in (b"\n", b"[]\n", b'{"do": "format"}\n', b'{"do": "set", "profile": 3}\n', b"\xff\x00\n"):
            with connected(path) as client:
                client.sendall(garbage)
                assert "error" in json.loads(client.recv(4096))
        with connected(path) as client, contextlib.suppress(ConnectionError):
            client.sendall(b"x" * 100_000)
            assert client.recv(4096) == b""
        with contextlib.ExitStack() as stack:
            for _ in range(40):
                stack.enter_context(connected(path))
            # They take all places, until their time is up.
            wait_until(answers, "the relay")


def test_a_network_that_is_not_up_is_one_error_line(tmp_path: Path) -> None:
    from testbed.network.control import GetStatus

    with pytest.raises(NetworkError, match="does not answer"):
        ask(tmp_path / "control.sock", GetStatus(), timeout_s=1)


@pytest.mark.parametrize("command", [("up", "testbed/network/specs/wifi.yaml"), ("down",)])
def test_without_root_the_error_names_an_alternative(command: tuple[str, ...]) -> None:
    nobody: list[str] = []
    if os.geteuid() == 0:
        skip_without("setpriv")
        nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    argv = [*nobody, sys.executable, "-m", "testbed", "net", *command]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if "Permission denied" in done.stderr:
        pytest.skip("the environment belongs to root: nobody else can run it")
    assert done.returncode == PrivilegeError.exit_code
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("wdmoe-testbed: error: emulated networks need root, this process lacks CAP_NET_ADMIN")
    assert "'network: localhost'" in done.stderr


def test_down_takes_one_network_or_all(run: Run) -> None:
    done = run("testbed", "net", "down", "--name", NAME, "--all")
    assert done.returncode == 2
    assert "--name and --all exclude each other" in done.stderr


def test_the_command_names_a_wrong_description(run: Run, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("name: t\nprofiles: {p: {default: {rate: 1}}}\n")
    done = run("testbed", "net", "up", wrong)
    assert done.returncode == 65
    assert done.stderr.count("\n") == 1
    assert "unknown field `rate`" in done.stderr
