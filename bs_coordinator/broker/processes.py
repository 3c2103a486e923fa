"""The broker that `--broker` names: a private one as a child process, or an existing one by its URL.

`embedded` is amqtt, in pure Python: nothing to install, about 0.5 ms per round trip. `mosquitto` is a private
mosquitto with a configuration made here. Both listen on loopback only; other devices need a broker on the network.
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

from bs_coordinator.config import PRIVATE_BROKERS, ClusterConfig
from common.child_output import c_locale
from common.config import ConfigError
from common.real_time import Priority, raise_thread, why_not
from wire.broker_address import BrokerAddress
from wire.broker_url import Access, parse_broker_url
from wire.errors import BrokerError

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
_START_TIMEOUT_S = 20.0
_STOP_TIMEOUT_S = 5.0
_NO_ACCESS = Access()


@contextmanager
def open_broker(
    spec: str, *, host: str = LOOPBACK, port: int = 0, access: Access = _NO_ACCESS, priority: Priority = "auto"
) -> Iterator[BrokerAddress]:
    """The address to connect to; a child broker lives as long as the context.

    Args:
        spec: `embedded`, `mosquitto` or a URL.
        host: address that a child broker listens on.
        port: of a child broker; 0 for any free one.
        access: credentials and certificates, for a URL.
        priority: whether a child broker gets real-time priority where that is permitted.

    Raises:
        ValueError: `spec` is none of these.
        BrokerError: the child broker does not start.
    """
    if spec not in PRIVATE_BROKERS:
        yield parse_broker_url(spec, access)
        return
    with tempfile.TemporaryDirectory(prefix="wdmoe-broker-") as folder:
        port = _check_free(host, port) if port else free_port(host)
        make_argv = _embedded_argv if spec == "embedded" else _mosquitto_argv
        argv = make_argv(Path(folder), host, port)
        with broker_process(argv, (host, port), spec, Path(folder) / "broker.log", priority=priority):
            yield BrokerAddress(host, port)


@contextmanager
def configured_broker(config: ClusterConfig) -> Iterator[BrokerAddress]:
    """The broker that a config names; a private one lives as long as the context.

    Raises:
        ConfigError: the URL is invalid.
        BrokerError: a private broker does not start.
    """
    with ExitStack() as stack:
        try:
            broker = open_broker(config.broker, port=config.broker_port, access=config.access, priority=config.priority)
            address = stack.enter_context(broker)
        except ValueError as error:
            raise ConfigError(f"--broker: {error}") from None
        if config.broker in PRIVATE_BROKERS:
            log.info("broker at %s: start nodes with --broker %s", address, address)
        yield address


@contextmanager
def broker_process(
    argv: list[str], address: tuple[str, int], name: str, log_path: Path, *, priority: Priority = "auto"
) -> Iterator[None]:
    """Run a broker as a child process while the context lasts.

    Args:
        argv: its command line.
        address: host and port that it listens on.
        name: for messages.
        log_path: file for its output.
        priority: whether it gets real-time priority where that is permitted.

    Raises:
        BrokerError: it does not start within 20 s.
    """
    with log_path.open("wb") as log:
        child = subprocess.Popen(
            die_with_parent(argv),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Ctrl-C must not reach the broker: its clients still have to disconnect cleanly.
            start_new_session=True,
            env=c_locale(),
        )
    try:
        if priority == "auto" and not why_not():
            raise_thread(child.pid)
        _wait_until_up(child, address, name, log_path)
        yield
    finally:
        stop_child(child)


def free_port(host: str = LOOPBACK) -> int:
    """A free TCP port of an address of this host. Another process may take it before it is used."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def _check_free(host: str, port: int) -> int:
    """Return the port if it is free: otherwise the program that uses it would be mistaken for the child broker."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as brokers do, to ignore connections in TIME_WAIT
        try:
            probe.bind((host, port))
        except OSError as error:
            raise BrokerError(
                f"no broker can listen on {host}:{port} ({error.strerror}): choose another port"
            ) from None
    return port


def die_with_parent(argv: list[str]) -> list[str]:
    """Wrap a command so that the kernel ends it when this process dies, even by SIGKILL, if setpriv is installed."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM", "--", *argv] if setpriv else argv


def stop_child(child: subprocess.Popen[bytes]) -> None:
    """End a child process by SIGTERM, or by SIGKILL if it is still running after 5 s."""
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
    """Path of mosquitto; None if it is not installed."""
    # Debian installs it in /usr/sbin, which is not on every user's PATH.
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")


def _mosquitto_argv(folder: Path, host: str, port: int) -> list[str]:
    mosquitto = mosquitto_path()
    if mosquitto is None:
        raise BrokerError("mosquitto is not installed: 'apt install mosquitto', or use --broker embedded")
    config = folder / "mosquitto.conf"
    config.write_text(
        f"listener {port} {host}\n"
        # When started by root, mosquitto would change its user, which cancels `die_with_parent`.
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
            lines = log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
            raise BrokerError(f"the {spec} broker ended at once: {lines[-1]}")
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=1.0):
            return
        time.sleep(0.05)
    raise BrokerError(f"the {spec} broker did not start on port {address[1]} within {_START_TIMEOUT_S:.0f} s")
