"""Keys as the command makes them, with a real mosquitto: who may connect, read and write, and whose frames count."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path, PurePosixPath

import psutil
import pytest

from bs_coordinator.broker.processes import free_port, mosquitto_path
from common.errors import KeyFileError
from edge_node.home_assistant import discovery_topic
from testbed.keys.authority import Authority, new_authority
from testbed.keys.folder import KeyFolder, create
from testbed.keys.mosquitto import HOME_ASSISTANT
from tests.conftest import Run
from tests.needs import needs
from tests.waiting import wait_until
from wire.broker_address import BrokerAddress
from wire.broker_url import Access, parse_broker_url
from wire.errors import BrokerAuthError, BrokerError, PlaintextError
from wire.manifest import Scheme
from wire.topics import Topics
from wire.transport import Transport
from wire.transports import connect

Bundle = Callable[[Scheme], Path]
CLUSTER = "lab"
TOPICS = Topics(CLUSTER)
HOST = "127.0.0.1"

pytestmark = needs("mosquitto")


class Site:
    """A folder of keys and a mosquitto that follows it."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.keys = create(
            folder, cluster=CLUSTER, hosts=[HOST], nodes=["a", "b"], days=1, port=self.port,
            broker_folder=PurePosixPath(folder / "broker"),
        )  # fmt: skip
        self.log = folder.parent / "mosquitto.log"
        config = folder / "broker" / "mosquitto.conf"
        with config.open("a") as file:
            file.write(f"log_dest file {self.log}\nlog_type all\n")
            if os.getuid() == 0:
                file.write("user root\n")  # else mosquitto becomes a user that can't read the folder
        self.process = subprocess.Popen([str(mosquitto_path()), "-c", str(config)])
        self._wait()

    def _wait(self) -> None:
        def answers() -> bool:
            try:
                self.connect("bs", "probe").close()
            except BrokerError:
                return False
            return True

        wait_until(answers, "mosquitto")

    def access(self, name: str) -> Access:
        folder = self.keys.path / name if name == "bs" else self.keys.path / "nodes" / name
        stem = "bs" if name == "bs" else "node"
        return Access(None, folder / "ca.crt", folder / f"{stem}.crt", folder / f"{stem}.key")

    @property
    def url(self) -> str:
        return f"mqtts://{HOST}:{self.port}"

    def connect(self, name: str, client: str, access: Access | None = None) -> Transport:
        return connect(parse_broker_url(self.url, access or self.access(name)), f"t-{client}")

    def reload(self) -> None:
        before = self.log.read_text().count("Reloading config")
        self.process.send_signal(signal.SIGHUP)
        wait_until(lambda: self.log.read_text().count("Reloading config") > before, "mosquitto to reload")

    def options(self, name: str) -> list[object]:
        access = self.access(name)
        return [
            "--broker", self.url, "--cluster", CLUSTER, "--ca-file", access.ca_file, "--tls-cert", access.tls_cert,
            "--tls-key", access.tls_key,
        ]  # fmt: skip


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path / "keys")
    yield site
    site.process.terminate()
    site.process.wait()


def _received(transport: Transport, seconds: float = 1.0) -> list[tuple[str, bytes]]:
    found = []
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if message := transport.receive(left):
            found.append((message.topic, message.payload))
    return found


def test_a_node_reads_only_its_own_work(site: Site) -> None:
    with closing(site.connect("bs", "bs")) as bs, closing(site.connect("a", "a")) as a:
        a.subscribe(TOPICS.work("a"))
        for topic in (TOPICS.work("b"), TOPICS.work("+"), TOPICS.results("+"), TOPICS.telemetry("+"), "#"):
            try:
                a.subscribe(topic)
            except BrokerAuthError:
                continue  # said so at once; a broker may also just keep silent
        bs.publish(TOPICS.work("b"), b"secret of b")
        bs.publish(TOPICS.work("a"), b"for a")
        assert _received(a) == [(TOPICS.work("a"), b"for a")]


def test_a_node_writes_only_its_own_topics(site: Site) -> None:
    with closing(site.connect("bs", "bs")) as bs, closing(site.connect("a", "a")) as a:
        bs.subscribe(TOPICS.results("+"))
        bs.subscribe(TOPICS.status("+"), qos=1)
        bs.subscribe(TOPICS.telemetry("+"))
        others = (TOPICS.results("b"), TOPICS.status("b"), TOPICS.telemetry("b"), TOPICS.work("b"), TOPICS.echo("t-bs"))
        for topic in others:
            a.publish(topic, b"not mine")
        mine = [(TOPICS.results("a"), b"mine"), (TOPICS.telemetry("a"), b"mine as well")]
        for topic, payload in mine:
            a.publish(topic, payload)
        assert _received(bs) == mine


def test_home_assistant_reads_and_nodes_announce_themselves_only(site: Site, run_process: Run) -> None:
    with closing(site.connect("a", "early")) as a:
        a.publish(discovery_topic("homeassistant", CLUSTER, "a"), b"not allowed yet", retain=True)
    done = run_process("testbed", "keys", "home-assistant", site.keys.path)
    assert done.returncode == 0, done.stderr
    assert "home-assistant to its machine" in done.stdout
    site.reload()
    folder = site.keys.path / HOME_ASSISTANT
    access = Access(None, folder / "ca.crt", folder / "home-assistant.crt", folder / "home-assistant.key")
    own, other = (discovery_topic("homeassistant", CLUSTER, node) for node in ("a", "b"))
    with closing(site.connect("", "home", access)) as home, closing(site.connect("a", "a")) as a:
        for topic in ("homeassistant/#", TOPICS.status("+"), TOPICS.telemetry("+")):
            home.subscribe(topic, qos=1)
        a.publish(other, b"not mine")
        mine = [(own, b"mine"), (TOPICS.telemetry("a"), b"mine as well")]
        for topic, payload in mine:
            a.publish(topic, payload)
        # It reads what nodes say about themselves, and can't say anything for them, or ask them.
        home.publish(TOPICS.status("a"), b"false")
        home.publish(TOPICS.work("a"), b"false")
        home.publish("homeassistant/status", b"online")
        assert sorted(_received(home)) == sorted([*mine, ("homeassistant/status", b"online")])
    assert [expiry.name for expiry in site.keys.expiries()].count(HOME_ASSISTANT) == 1
    site.keys.add(["c"], days=1)  # keeps Home Assistant in the access list
    acl = (site.keys.path / "broker" / "acl").read_text()
    assert f"topic write {discovery_topic('homeassistant', CLUSTER, 'c')}" in acl
    before = (folder / "home-assistant.crt").read_bytes()
    site.keys.rotate([HOME_ASSISTANT], days=1, revoke_old=True)
    assert (folder / "home-assistant.crt").read_bytes() != before


# paho leaves a socket whose handshake failed to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_strangers_and_invalid_certificates_are_refused(site: Site, tmp_path: Path) -> None:
    ca_file = site.keys.path / "ca.crt"
    own = Authority(ca_file.read_bytes(), (site.keys.path / "ca.key").read_bytes())
    other = Authority(*new_authority("elsewhere", days=1))

    def access(authority: Authority, name: str, days: float) -> Access:
        files = []
        for kind, content in authority.issue(name, days=days)._asdict().items():
            files.append(tmp_path / f"{name}.{kind}")
            files[-1].write_bytes(content)
            files[-1].chmod(0o600)
        return Access(None, ca_file, files[0], files[1])

    site.connect("a", "good", access(own, "a", 1)).close()
    for client, refused in {
        "none": Access(None, ca_file),
        "expired": access(own, "a", -0.01),
        "foreign": access(other, "a", 1),
    }.items():
        with pytest.raises(BrokerError):
            site.connect("a", client, refused)
    with pytest.raises(BrokerAuthError, match="TLS"):  # the broker is checked as well
        site.connect("a", "suspicious", Access())
    with pytest.raises(BrokerError):
        connect(BrokerAddress(HOST, site.port), "t-plain")


def test_a_revoked_node_is_disconnected_at_once(site: Site) -> None:
    access = site.access("a")
    kept = {path: path.read_bytes() for path in (access.tls_cert, access.tls_key, access.ca_file) if path}
    with closing(site.connect("bs", "bs")) as bs, closing(site.connect("a", "a")) as a:
        bs.subscribe(TOPICS.results("+"))
        a.subscribe(TOPICS.work("a"))
        site.keys.revoke(["a"])
        assert site.keys.nodes == ["b"]
        site.reload()
        # A session that is open already loses its rights.
        bs.publish(TOPICS.work("a"), b"work")
        a.publish(TOPICS.results("a"), b"result")
        assert _received(bs) == []
        assert _received(a, 0.2) == []
    for path, content in kept.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(0o600)
    with pytest.raises(BrokerError):
        site.connect("a", "back", access)
    site.connect("b", "other").close()


def test_rotation(site: Site) -> None:
    old = site.access("a")
    kept = {path: path.read_bytes() for path in (old.tls_cert, old.tls_key) if path}
    frame_key = (site.keys.path / "nodes" / "b" / "frame.key").read_bytes()
    site.keys.rotate(["a", "broker", "bs", "frames"], days=2, revoke_old=True)
    site.process.terminate()
    site.process.wait()
    site.process = subprocess.Popen([str(mosquitto_path()), "-c", str(site.keys.path / "broker" / "mosquitto.conf")])
    site._wait()
    site.connect("a", "new").close()
    assert (site.keys.path / "nodes" / "b" / "frame.key").read_bytes() != frame_key
    assert site.keys.expiries()[0].name == "b"
    for path, content in kept.items():
        path.write_bytes(content)
    with pytest.raises(BrokerError):
        site.connect("a", "old")


def test_all_keys_are_private_and_nothing_is_overwritten(site: Site, run_process: Run, tmp_path: Path) -> None:
    for path in [site.keys.path, *site.keys.path.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    for arguments, words in [
        (["init", site.keys.path, "--host", "h"], "exists already"),
        (["init", tmp_path / "n", "--host", "h", "--node", "a/b"], "not valid"),
        (["init", tmp_path / "n", "--host", "h", "--node", "bs"], "is a reserved name"),
        (["add", site.keys.path, "a"], "has keys already"),
        (["revoke", site.keys.path, "c"], "nodes with keys: a, b"),
        (["rotate", site.keys.path, "home-assistant"], "Home Assistant has no keys"),
        (["home-assistant", site.keys.path, "--prefix", "a/+"], "is not a prefix of topics"),
        (["list", tmp_path], "holds no keys"),
    ]:
        done = run_process("testbed", "keys", *arguments)
        assert done.returncode == KeyFileError.exit_code
        assert len(done.stderr.splitlines()) == 1
        assert words in done.stderr
    assert not (tmp_path / "n").exists()
    (site.keys.path / "ca.key").chmod(0o644)
    with pytest.raises(KeyFileError, match="chmod 600"):
        KeyFolder(site.keys.path)


def test_plaintext_beyond_loopback_needs_the_option() -> None:
    with pytest.raises(PlaintextError, match="mqtts://"):
        parse_broker_url("mqtt://192.0.2.1")
    assert parse_broker_url("mqtt://192.0.2.1", Access(allow_plaintext=True)).port == 1883
    for loopback in ("mqtt://localhost", "mqtt://127.0.0.1", "mqtt://[::1]", "mqtts://192.0.2.1"):
        parse_broker_url(loopback)


@pytest.fixture
def signed(site: Site, tiny_bundle: Bundle, tmp_path: Path, run_process: Run) -> tuple[Path, list[object]]:
    """A signed bundle, and the arguments of the base station for TLS with frame keys."""
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle("fp32"), bundle)
    assert run_process("exporter", "sign", bundle, "--key", site.keys.path / "bundle.key").returncode == 0
    bs = site.keys.path / "bs"
    return bundle, [
        "generate", "--bundle", bundle, *site.options("bs"), "--cluster-key", bs / "cluster.key",
        "--bundle-key", bs / "bundle.pub", "--prompt", "Hello", "--raw", "--wire", "fp32", "--no-degrade",
    ]  # fmt: skip


@contextmanager
def _node(site: Site, bundle: Path, name: str, experts: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A node process with its own keys."""
    folder = site.keys.path / "nodes" / name
    argv = [
        sys.executable, "-m", "edge_node", "--bundle", bundle, "--id", name, "--experts", experts,
        *site.options(name), "--frame-key", folder / "frame.key", "--bundle-key", folder / "bundle.pub",
    ]  # fmt: skip
    with log.open("wb") as file:
        process = subprocess.Popen([str(a) for a in argv], stdin=subprocess.DEVNULL, stderr=file)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def sealed(site: Site, signed: tuple[Path, list[object]], tmp_path: Path) -> Iterator[tuple[Path, list[object]]]:
    """As `signed`, with the nodes a and b running."""
    with ExitStack() as stack:
        for name, experts in (("a", "L*:E0-3"), ("b", "L*:E4-7")):
            stack.enter_context(_node(site, signed[0], name, experts, tmp_path / f"{name}.log"))
        yield signed


@contextmanager
def _recording(ear: Transport, topic: str) -> Iterator[list[bytes]]:
    """All messages of a topic while the context lasts."""
    messages: list[bytes] = []
    stop = threading.Event()

    def listen() -> None:
        while not stop.is_set():
            if message := ear.receive(0.1):
                messages.append(message.payload)

    with closing(ear):
        ear.subscribe(topic)
        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield messages
        finally:
            stop.set()
            thread.join()


_MALLORY = """
import sys, time, zlib
from pathlib import Path
from wire.broker_url import Access, parse_broker_url
from wire.transports import connect
url, folder, root = sys.argv[1:]
f = Path(folder)
t = connect(parse_broker_url(url, Access(None, f / "ca.crt", f / "node.crt", f / "node.key")), "mallory")
t.subscribe(root + "/results/+")
Path(sys.argv[2], "ready").touch()
own = set()
while True:
    m = t.receive(1.0)
    if m is None or m.payload in own or len(own) > 3000:
        continue
    changed = bytearray(m.payload)
    changed[len(changed) // 2] ^= 0x40
    for payload in (m.payload, bytes(changed)):
        own.add(payload)
        t.publish(m.topic, payload)
"""


@pytest.mark.slow
def test_answers_forged_by_the_broker_do_not_count(
    site: Site, sealed: tuple[Path, list[object]], run_process: Run, tmp_path: Path
) -> None:
    """An attacker who may publish on every topic, as the broker itself may, forges answers of the nodes."""
    _, generate = sealed
    calm = run_process("bs_coordinator", *generate, "--max-tokens", 24)
    assert calm.returncode == 0, calm.stderr
    site.keys.add(["mallory"], days=1)
    with (site.keys.path / "broker" / "acl").open("a") as file:
        file.write("\nuser mallory\ntopic readwrite #\n")
    site.reload()
    folder = site.keys.path / "nodes" / "mallory"
    mallory = subprocess.Popen([sys.executable, "-c", _MALLORY, site.url, folder, f"wdmoe/v1/{CLUSTER}"])
    try:
        wait_until((folder / "ready").exists, "mallory")
        attacked = run_process("bs_coordinator", *generate, "--max-tokens", 24)
    finally:
        mallory.kill()
        mallory.wait()
    assert attacked.returncode == 0, attacked.stderr
    assert attacked.stdout == calm.stdout
    assert "dropped" in attacked.stderr
    unsealed = run_process("bs_coordinator", *_without(generate, "--cluster-key"), "--nodes-timeout", 8)
    assert unsealed.returncode == 40, unsealed.stderr
    assert "its frames carry tags: give the base station --cluster-key" in unsealed.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_restarted_node_does_not_work_for_recorded_requests(
    site: Site, signed: tuple[Path, list[object]], run_process: Run, tmp_path: Path
) -> None:
    """An attacker who may read and publish on every topic records an answer's requests and replays them."""
    bundle, generate = signed
    site.keys.add(["mallory"], days=1)
    with (site.keys.path / "broker" / "acl").open("a") as file:
        file.write("\nuser mallory\ntopic readwrite #\n")
    site.reload()
    folder = site.keys.path / "nodes" / "mallory"
    access = Access(None, folder / "ca.crt", folder / "node.crt", folder / "node.key")
    with (
        _recording(site.connect("mallory", "ear", access), TOPICS.work("a")) as recorded,
        _node(site, bundle, "a", "L*:E*", tmp_path / "first.log"),
    ):
        answer = run_process("bs_coordinator", *generate, "--max-tokens", 4)
    assert answer.returncode == 0, answer.stderr
    assert recorded
    log = tmp_path / "restarted.log"
    with _node(site, bundle, "a", "L*:E*", log):
        wait_until(lambda: "serves" in log.read_text(), "the node to restart")
        with closing(site.connect("mallory", "mouth", access)) as mallory:
            mallory.subscribe(TOPICS.results("a"))
            for payload in recorded:
                mallory.publish(TOPICS.work("a"), payload)
            replies = _received(mallory)
    assert replies == []
    assert f"dropped:forged {len(recorded)}" in log.read_text()


def test_an_unsigned_or_changed_bundle_is_refused(sealed: tuple[Path, list[object]], run_process: Run) -> None:
    bundle, generate = sealed
    manifest = bundle / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"layers"', b'"layers" ', 1))
    done = run_process("bs_coordinator", *generate)
    assert (done.returncode, len(done.stderr.splitlines())) == (14, 1), done.stderr
    (bundle / "manifest.sig").unlink()
    done = run_process("bs_coordinator", *generate)
    assert done.returncode == 14
    assert "is not signed" in done.stderr


def test_no_secret_appears_in_logs_or_arguments(
    site: Site, sealed: tuple[Path, list[object]], run_process: Run, tmp_path: Path
) -> None:
    _, generate = sealed
    out = tmp_path / "run"
    out.mkdir()
    done = run_process("bs_coordinator", *generate, "--max-tokens", 8, "--link-log", out / "links.jsonl")
    assert done.returncode == 0, done.stderr
    secrets = [(site.keys.path / "bs" / "cluster.key").read_text().split()[-1]]
    secrets += [path.read_text().split()[-1] for path in site.keys.path.rglob("frame.key")]
    # Any line in the middle of a key's PEM gives it away.
    secrets += [
        path.read_text().splitlines()[2] for path in site.keys.path.rglob("*.key") if "BEGIN" in path.read_text()
    ]
    texts = [done.stdout, done.stderr, site.log.read_text(errors="replace")]
    texts += [path.read_text(errors="replace") for path in [*tmp_path.glob("*.log"), *out.iterdir()]]
    texts += ["\n".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert len(secrets) >= 8
    assert not [secret for secret in secrets for text in texts if secret in text]


def _without(arguments: list[object], option: str) -> list[object]:
    at = arguments.index(option)
    return arguments[:at] + arguments[at + 2 :]
