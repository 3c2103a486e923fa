"""What goes wrong, as a user meets it: one clear line, the right exit code, no hang, no traceback."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from bs_coordinator.broker.processes import free_port, mosquitto_path
from testbed.local_nodes import LocalNodes
from tests.conftest import Run
from tests.needs import needs, skip_without
from tests.waiting import wait_until
from wire.broker_address import BrokerAddress
from wire.manifest import Scheme
from wire.status import decode_status
from wire.topics import Topics
from wire.transports import connect

Bundle = Callable[[Scheme], Path]


def _one_line(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """The process ended with `code` and its last line of stderr is the error, with these words in it."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0]


def _cluster(fleet: LocalNodes) -> list[str]:
    return ["--broker", str(fleet.address), "--cluster", fleet.cluster]


def _generate(run: Run, fleet: LocalNodes, *extra: object) -> subprocess.CompletedProcess[str]:
    return run(
        "bs_coordinator", "generate", "--bundle", fleet.bundle, *_cluster(fleet), "--prompt", "Hello",
        "--max-tokens", 8, *extra,
    )  # fmt: skip


def _endless_argv(fleet: LocalNodes) -> list[str]:
    """An answer long enough to be interrupted."""
    return [
        sys.executable, "-m", "bs_coordinator", "generate", "--bundle", str(fleet.bundle),
        *_cluster(fleet), "--prompt", "Hello", "--max-tokens", "5000", "--raw",
    ]  # fmt: skip


@pytest.fixture
def full_fleet(fleet: LocalNodes) -> LocalNodes:
    for k in range(4):
        fleet.start(f"n{k}", f"L*:E{k},{k + 4}")
    return fleet


def test_generate_prints_the_answer(run_process: Run, full_fleet: LocalNodes) -> None:
    done = _generate(run_process, full_fleet)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "8 tokens" in done.stderr
    assert _generate(run_process, full_fleet).stdout == done.stdout


def test_nodes_are_listed(run: Run, full_fleet: LocalNodes) -> None:
    for k in range(4):
        _wait_for_status(full_fleet, f"n{k}", online=True)
    done = run("bs_coordinator", "nodes", "--bundle", full_fleet.bundle, *_cluster(full_fleet))
    assert done.returncode == 0, done.stderr
    assert all(f"n{k}" in done.stdout for k in range(4))
    assert "…" not in done.stdout
    done = run("bs_coordinator", "nodes", "--bundle", full_fleet.bundle, *_cluster(full_fleet), "--json")
    listed = json.loads(done.stdout)
    assert [node["node"] for node in listed["nodes"]] == [f"n{k}" for k in range(4)]
    assert (listed["ignored"], listed["missing_experts"]) == ({}, "")
    probed = run("bs_coordinator", "links", "--bundle", full_fleet.bundle, *_cluster(full_fleet), "--seconds", 0.5)
    assert probed.returncode == 0, probed.stderr
    assert "±" in probed.stdout
    assert "…" not in probed.stdout
    command = ["links", "--bundle", full_fleet.bundle, *_cluster(full_fleet), "--seconds", 0.5, "--json"]
    assert all(node["link"]["rtt_s"] > 0 for node in json.loads(run("bs_coordinator", *command).stdout))


def test_chat_remembers(run_process: Run, full_fleet: LocalNodes) -> None:
    done = run_process(
        "bs_coordinator", "chat", "--bundle", full_fleet.bundle, *_cluster(full_fleet), "--max-tokens", 4,
        input="Hello\nAnd again\n\n",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("4 tokens") == 2


def test_no_broker(run_process: Run, tiny_bundle: Bundle) -> None:
    url = f"mqtt://127.0.0.1:{free_port()}"
    generate = ("generate", "--bundle", tiny_bundle("fp32"), "--broker", url, "--prompt", "x")
    _one_line(run_process("bs_coordinator", *generate), 30, "no broker at", "refused")
    node = ("--bundle", tiny_bundle("fp32"), "--broker", url, "--id", "a", "--experts", "L0:E0")
    _one_line(run_process("edge_node", *node), 30, "no broker at")


def test_an_expert_that_no_node_holds(run: Run, fleet: LocalNodes) -> None:
    fleet.start("n0", "L*:E0-6")
    _one_line(_generate(run, fleet, "--nodes-timeout", 4), 40, "no node holds L0-1:E7", "online: n0", "wdmoe-node")


def test_a_prompt_longer_than_the_context(run: Run, full_fleet: LocalNodes) -> None:
    done = _generate(run, full_fleet, "--prompt", "word " * 9000)
    _one_line(done, 42, "context is 8192")


def test_two_nodes_with_one_id(run_process: Run, fleet: LocalNodes) -> None:
    fleet.start("twin", "L*:E0")
    _wait_for_status(fleet, "twin", online=True)
    node = ("--bundle", fleet.bundle, *_cluster(fleet), "--id", "twin", "--experts", "L*:E1")
    _one_line(run_process("edge_node", *node), 22, "'twin' is in use", "another --id")
    fleet.check()


def test_a_node_that_was_killed_comes_back_under_its_id(fleet: LocalNodes) -> None:
    fleet.start("phoenix", "L*:E0")
    _wait_for_status(fleet, "phoenix", online=True)
    fleet.processes["phoenix"].kill()
    fleet.processes["phoenix"].wait()
    _wait_for_status(fleet, "phoenix", online=False)
    fleet.start("phoenix", "L*:E0")
    _wait_for_status(fleet, "phoenix", online=True)


def test_a_node_that_gets_sigterm_announces_that_it_leaves(fleet: LocalNodes) -> None:
    fleet.start("polite", "L*:E0")
    _wait_for_status(fleet, "polite", online=True)
    fleet.processes["polite"].terminate()
    assert fleet.processes["polite"].wait() == 0
    _wait_for_status(fleet, "polite", online=False, reason="stopped")


def test_a_node_lost_in_mid_answer(full_fleet: LocalNodes) -> None:
    argv = [*_endless_argv(full_fleet), "--no-degrade"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.read(4)
        full_fleet.processes["n2"].kill()
        out, err = process.communicate()
    _one_line(subprocess.CompletedProcess(argv, process.returncode, out, err), process.returncode, "n")
    assert process.returncode in (40, 41)  # gone while asked, or before it could be asked again


def test_ctrl_c_stops_cleanly(full_fleet: LocalNodes) -> None:
    argv = _endless_argv(full_fleet)
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.read(4)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in err
    full_fleet.check()


def test_garbage_on_every_topic_changes_nothing(run: Run, full_fleet: LocalNodes) -> None:
    """Noise is counted and dropped by both sides; the answer is the one without noise."""
    quiet = _generate(run, full_fleet)
    assert quiet.returncode == 0, quiet.stderr
    topics = Topics(full_fleet.cluster)
    names = ["n0", "n1", "n2", "n3", "ghost"]
    random_bytes = random.Random(1).randbytes  # noqa: S311
    with closing(connect(full_fleet.address, "noise")) as noise:
        for name in names:
            noise.publish_confirmed(topics.status(f"ghost-{name}"), b"\x00not json", retain=True)
        argv = [
            sys.executable, "-m", "bs_coordinator", "generate", "--bundle", str(full_fleet.bundle),
            *_cluster(full_fleet), "--prompt", "Hello", "--max-tokens", "8",
        ]  # fmt: skip
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            while process.poll() is None:
                for name in names:
                    noise.publish(topics.work(name), random_bytes(100))
                    noise.publish(topics.results(name), random_bytes(100))
                    noise.publish(topics.status(f"ghost-{name}"), random_bytes(50))
                noise.receive(0.01)
            out, err = process.communicate()
    assert process.returncode == 0, err
    assert out == quiet.stdout
    assert "dropped messages" in err
    full_fleet.check()


def test_a_tampered_expert(run: Run, tiny_bundle: Bundle, broker: BrokerAddress, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle("int4"), bundle)
    weights = bundle / "experts/L01/E3.weights"
    data = bytearray(weights.read_bytes())
    data[1000] ^= 1
    weights.write_bytes(data)
    node = ("--bundle", bundle, "--broker", broker, "--id", "t", "--experts", "L*:E3")
    _one_line(run("edge_node", *node), 11, "E3.weights", "SHA-256")
    _one_line(run("exporter", "verify", bundle), 11, "E3.weights", "SHA-256")


def test_experts_that_do_not_fit(run: Run, tiny_bundle: Bundle, broker: BrokerAddress) -> None:
    node = ("--bundle", tiny_bundle("fp32"), "--broker", broker, "--id", "m", "--experts", "L*:E*")
    _one_line(run("edge_node", *node, "--memory-budget", "100M"), 20, "need about", "100 MiB are allowed")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--experts", "E3"], "expert selector"),
        (["--experts", "L*:E9"], "out of range"),
        (["--id", "a/b"], "not valid"),
        (["--broker", "http://x"], "not a broker URL"),
        (["--broker", "mqtt://u:hush@x"], "--password-file"),
        (["--memory-budget", "lots"], "not a size"),
        (["--threads", "0"], "threads"),
    ],
)
def test_wrong_arguments(run: Run, tiny_bundle: Bundle, arguments: list[str], word: str) -> None:
    good = ["--bundle", tiny_bundle("int4"), "--broker", "mqtt://127.0.0.1", "--id", "a", "--experts", "L0:E0"]
    done = run("edge_node", *good, *arguments)
    _one_line(done, 2, word)
    assert "hush" not in done.stderr


def test_a_device_that_trunks_can_not_run_on(run: Run, tiny_bundle: Bundle) -> None:
    done = run("bs_coordinator", "generate", "--bundle", tiny_bundle("fp32"), "--prompt", "x", "--device", "banana")
    _one_line(done, 46, "--device banana")


def test_a_prompt_that_is_not_utf_8(run_process: Run, tiny_bundle: Bundle) -> None:
    prompt = os.fsdecode(b"caf\xe9")
    done = run_process("bs_coordinator", "generate", "--bundle", tiny_bundle("fp32"), "--prompt", prompt)
    _one_line(done, 2, "--prompt is not UTF-8: byte 4 is 0xe9")


@pytest.mark.parametrize("kind", ["embedded", pytest.param("mosquitto", marks=needs("mosquitto"))])
def test_a_port_that_another_broker_has(run: Run, broker: BrokerAddress, kind: str) -> None:
    done = run("bs_coordinator", "broker", "--kind", kind, "--port", broker.port)
    _one_line(done, 30, "choose another port")


def test_a_folder_that_is_not_a_bundle(run: Run, tmp_path: Path) -> None:
    _one_line(run("bs_coordinator", "generate", "--bundle", tmp_path, "--prompt", "x"), 11, "wdmoe-export bundle")


@pytest.fixture(scope="module")
def mosquitto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], BrokerAddress]]:
    """Starts mosquitto with given configuration lines; skips where it is not installed."""
    skip_without("mosquitto")
    binary = str(mosquitto_path())
    running: list[subprocess.Popen[bytes]] = []

    def start(lines: str) -> BrokerAddress:
        port = free_port()
        config = tmp_path_factory.mktemp("mosquitto") / "mosquitto.conf"
        config.write_text(f"listener {port} 127.0.0.1\n{lines}")
        if os.getuid() == 0:
            config.write_text(config.read_text() + "user root\n")
        running.append(
            subprocess.Popen([binary, "-c", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )
        address = BrokerAddress("127.0.0.1", port)
        wait_until(lambda: _accepts(address), "mosquitto")
        return address

    yield start
    for process in running:
        process.terminate()
        process.wait()


def _accepts(address: BrokerAddress) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address.host, address.port)):
        return True
    return False


def test_a_broker_without_nodelay_is_refused(
    run: Run, tiny_bundle: Bundle, mosquitto: Callable[[str], BrokerAddress]
) -> None:
    address = mosquitto("allow_anonymous true\n")
    done = run("bs_coordinator", "generate", "--bundle", tiny_bundle("int4"), "--broker", address, "--prompt", "x")
    _one_line(done, 32, "TCP_NODELAY", "set_tcp_nodelay true")


def test_a_wrong_password(
    run: Run, tiny_bundle: Bundle, mosquitto: Callable[[str], BrokerAddress], tmp_path: Path
) -> None:
    passwords = tmp_path / "passwords"
    subprocess.run(["mosquitto_passwd", "-b", "-c", passwords, "bs", "right"], check=True, capture_output=True)
    address = mosquitto(f"allow_anonymous false\nset_tcp_nodelay true\npassword_file {passwords}\n")
    secret = tmp_path / "secret"
    secret.write_text("wrong\n")
    secret.chmod(0o600)
    url = f"mqtt://bs@{address.host}:{address.port}"
    generate = ["generate", "--bundle", tiny_bundle("int4"), "--prompt", "x", "--broker", url]
    _one_line(run("bs_coordinator", *generate, "--password-file", secret), 31, "refused user 'bs'")
    _one_line(run("bs_coordinator", *generate), 31, "refused user 'bs'")
    secret.write_text("right\n")
    right = run("bs_coordinator", *generate, "--password-file", secret, "--nodes-timeout", 0)
    _one_line(right, 40, "no node holds")
    node = ["--bundle", tiny_bundle("int4"), "--id", "a", "--experts", "L0:E0", "--broker", url]
    secret.write_text("wrong\n")
    _one_line(run("edge_node", *node, "--password-file", secret), 31, "refused user 'bs'")


def test_an_access_list_that_forbids_the_node(
    run: Run, tiny_bundle: Bundle, mosquitto: Callable[[str], BrokerAddress], tmp_path: Path
) -> None:
    passwords, rules, secret = tmp_path / "passwords", tmp_path / "acl", tmp_path / "secret"
    subprocess.run(["mosquitto_passwd", "-b", "-c", passwords, "pi1", "right"], check=True, capture_output=True)
    rules.write_text("pattern readwrite wdmoe/v1/default/nodes/%u/status\n")
    secret.write_text("right\n")
    secret.chmod(0o600)
    address = mosquitto(f"allow_anonymous false\npassword_file {passwords}\nacl_file {rules}\n")
    node = ("--bundle", tiny_bundle("int4"), "--experts", "L0:E0", "--password-file", secret)
    url = f"mqtt://pi1@{address.host}:{address.port}"
    done = run("edge_node", *node, "--broker", url, "--id", "pi2")
    _one_line(done, 31, "does not pass on wdmoe/v1/default/nodes/pi2/status", "user 'pi1'", "node 'pi2'")


def _wait_for_status(fleet: LocalNodes, node: str, *, online: bool, reason: str = "") -> None:
    topic = Topics(fleet.cluster).status(node)
    with closing(connect(fleet.address, f"watch-{time.time_ns()}")) as watch:
        watch.subscribe(topic, qos=1)

        def is_so() -> bool:
            message = watch.receive(0.5)
            # amqtt delivers retained messages of other topics too.
            if not message or message.topic != topic or not message.payload:
                return False
            status = decode_status(message.payload, node)
            return status.online is online and reason in status.reason

        wait_until(is_so, f"'{node}' to be {'online' if online else 'offline'}", poll_s=0)
