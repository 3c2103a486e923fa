"""The broker behind `--broker`: one of our own as a child process, or somebody's by URL.

`embedded` is amqtt, pure Python: nothing to install, about 0.5 ms a round trip. `mosquitto` is a private
mosquitto with a configuration made here. Both listen on loopback only; devices need a broker on the network.
"""

import contextlib
import importlib.util
import logging
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bs_coordinator.config import ClusterConfig
from common.config import ConfigError
from wire.broker_url import Access, BrokerAddress, parse_broker_url
from wire.errors import BrokerError

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
PRIVATE_BROKERS = ("embedded", "mosquitto")
_START_TIMEOUT_S = 20.0
_STOP_TIMEOUT_S = 5.0
_NO_ACCESS = Access()


@contextmanager
def open_broker(
    spec: str, *, host: str = LOOPBACK, port: int = 0, access: Access = _NO_ACCESS
) -> Iterator[BrokerAddress]:
    """The address to connect to; a child broker lives as long as the context.

    Args:
        spec: `embedded`, `mosquitto` or an URL.
        host: address that a child broker listens on.
        port: for a child broker; 0 for any free one.
        access: for an URL.

    Raises:
        ValueError: `spec` is none of these.
        BrokerError: the child does not come up.
    """
    if spec not in PRIVATE_BROKERS:
        yield parse_broker_url(spec, access)
        return
    with tempfile.TemporaryDirectory(prefix="wdmoe-broker-") as folder:
        port = _check_free(host, port) if port else free_port(host)
        make_argv = _embedded_argv if spec == "embedded" else _mosquitto_argv
        argv = make_argv(Path(folder), host, port)
        with broker_process(argv, (host, port), spec, Path(folder) / "broker.log"):
            yield BrokerAddress(host, port)


@contextmanager
def configured_broker(config: ClusterConfig) -> Iterator[BrokerAddress]:
    """The broker that a config names; a private one lives as long as the context.

    Raises:
        ConfigError: the URL is wrong.
        BrokerError: a private broker does not come up.
    """
    with ExitStack() as stack:
        try:
            address = stack.enter_context(open_broker(config.broker, port=config.broker_port, access=config.access))
        except ValueError as error:
            raise ConfigError(f"--broker: {error}") from None
        if config.broker in PRIVATE_BROKERS:
            log.info("broker at %s: start nodes with --broker %s", address, address)
        yield address


@contextmanager
def broker_process(argv: list[str], address: tuple[str, int], name: str, log_path: Path) -> Iterator[None]:
    """A broker as a child that listens on `address` and lives as long as the context.

    Raises:
        BrokerError: it does not come up.
    """
    with log_path.open("wb") as log:
        child = subprocess.Popen(
            die_with_parent(argv),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Ctrl-C is for us: the broker must outlive the clean good-byes of its clients.
            start_new_session=True,
        )
    try:
        _wait_until_up(child, address, name, log_path)
        yield
    finally:
        stop_child(child)


def free_port(host: str = LOOPBACK) -> int:
    """A TCP port of an address of this host that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def _check_free(host: str, port: int) -> int:
    """The port. Else whoever has it would be taken for the child that did not get it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as brokers do: not hindered by old connections
        try:
            probe.bind((host, port))
        except OSError as error:
            raise BrokerError(f"no broker can listen on {host}:{port} ({error.strerror}): say another port") from None
    return port


def die_with_parent(argv: list[str]) -> list[str]:
    """The command such that the kernel ends it when we die, even by kill -9, where util-linux allows."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM", "--", *argv] if setpriv else argv


def stop_child(child: subprocess.Popen[bytes]) -> None:
    """End a child: politely, then not."""
    child.terminate()
    try:
        child.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _embedded_argv(folder: Path, host: str, port: int) -> list[str]:
    if importlib.util.find_spec("amqtt") is None:
        raise BrokerError("--broker embedded needs the package amqtt: pip install 'wdmoe[bs]'")
    return [sys.executable, "-m", "bs_coordinator.broker.embedded", host, str(port)]


def mosquitto_path() -> str | None:
    """Where mosquitto is, if it is installed."""
    # Debian puts it into /usr/sbin, which is not on every user's PATH.
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")


def _mosquitto_argv(folder: Path, host: str, port: int) -> list[str]:
    mosquitto = mosquitto_path()
    if mosquitto is None:
        raise BrokerError("mosquitto is not installed: 'apt install mosquitto', or use --broker embedded")
    config = folder / "mosquitto.conf"
    config.write_text(
        f"listener {port} {host}\n"
        # Started by root it would change its user, and a change of user undoes `die_with_parent`.
        "user root\n"
        "allow_anonymous true\n"
        "set_tcp_nodelay true\n"
        "persistence false\n"
        "max_inflight_messages 0\n"
        "log_dest stderr\n"
    )
    return [mosquitto, "-c", str(config)]


def _wait_until_up(child: subprocess.Popen[bytes], address: tuple[str, int], spec: str, log_path: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if child.poll() is not None:
            lines = log_path.read_text(errors="replace").strip().splitlines() or ["no output"]
            raise BrokerError(f"the {spec} broker ended at once: {lines[-1]}")
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=1.0):
            return
        time.sleep(0.05)
    raise BrokerError(f"the {spec} broker did not come up on port {address[1]} within {_START_TIMEOUT_S:.0f} s")
