"""Bring emulated networks up and down, and control a running one."""

import hashlib
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil

from testbed.errors import NetworkError, PrivilegeError
from testbed.network import namespaces, state
from testbed.network.control import GetStatus, Hold, NetworkStatus, Request, SetProfile, ask
from testbed.network.daemon import BASE_STATION, READY
from testbed.network.spec import NetworkSpec, read_spec
from testbed.network.state import State

_READY_S = 20.0
_STOP_S = 5.0


class EmulatedNetwork:
    """A network that is up.

    Attributes:
        spec: its description.
        truth_path: JSON lines with the configured links: time, node, profile and the link's values, a line per change.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        self.spec = spec
        self._state = State(spec.name)
        self.truth_path = self._state.truth

    @property
    def nodes(self) -> tuple[str, ...]:
        """All node ids."""
        return self.spec.node_ids

    @property
    def bs_address(self) -> str:
        """The base station's IPv4 address, as nodes see it."""
        return self.spec.address(0)

    def node_address(self, node: str) -> str:
        """A node's IPv4 address.

        Raises:
            NetworkError: the network has no such node.
        """
        return self.spec.address(1 + self._index(node))

    def bs_prefix(self) -> list[str]:
        """Words to put before a command to run it on the base station."""
        return _enter(self.spec.name, BASE_STATION)

    def prefix(self, node: str) -> list[str]:
        """Words to put before a command to run it on `node`.

        Raises:
            NetworkError: the network has no such node.
        """
        return _enter(self.spec.name, self.nodes[self._index(node)])

    def set_profile(self, name: str) -> None:
        """Switch to a profile, from its beginning.

        Raises:
            NetworkError: there is no profile of that name, or the network does not answer.
        """
        self.ask(SetProfile(name))

    def hold(self, at_s: float | None) -> None:
        """Hold the profile at a moment, in seconds; None restarts it from its beginning.

        Raises:
            NetworkError: the network does not answer.
        """
        self.ask(Hold(at_s))

    def truth(self) -> list[tuple[str, str, float]]:
        """The links as currently configured: (node, quantity with its unit, value) each.

        Raises:
            NetworkError: the network does not answer.
        """
        return [
            (node.node, quantity, value)
            for node in self.status().nodes
            for quantity, value in msgspec.structs.asdict(node.link).items()
        ]

    def status(self) -> NetworkStatus:
        """Links, traffic counters and the relay's load.

        Raises:
            NetworkError: the network does not answer.
        """
        return self.ask(GetStatus())

    def ask(self, request: Request) -> NetworkStatus:
        """Send a request to the relay.

        Raises:
            NetworkError: the relay does not answer, or refuses.
        """
        return ask(self._state.control, request)

    def _index(self, node: str) -> int:
        if node not in self.nodes:
            raise NetworkError(f"the network '{self.spec.name}' has no node '{node}', only {', '.join(self.nodes)}")
        return self.nodes.index(node)


def up(spec_path: Path, *, owned: bool = False) -> EmulatedNetwork:
    """Bring a network up, after removing the remains of a crashed one with the same name.

    Args:
        owned: the network ends with this process, even if the process is killed.

    Raises:
        NetworkSpecError: the description is wrong.
        PrivilegeError: this process lacks the rights.
        NetworkError: a network with that name is up already, or this one does not come up.
    """
    spec = read_spec(spec_path)
    namespaces.check_privileges()
    if shutil.which("setsid") is None or shutil.which("nsenter") is None:
        raise NetworkError("emulated networks need setsid and nsenter: install util-linux")
    with state.locked(spec.name) as files:
        if files.relay() is not None:
            raise NetworkError(
                f"the network '{spec.name}' is already up: 'wdmoe-testbed net down --name {spec.name}' first"
            )
        _clean(spec.name, files)
        files.folder.mkdir(mode=0o700)
        files.spec.write_bytes(spec_path.read_bytes())
        try:
            _start(spec.name, files, owned=owned)
        except BaseException:
            _clean(spec.name, files)
            raise
    return EmulatedNetwork(spec)


def attach(spec_path: Path) -> EmulatedNetwork:
    """Connect to a network that is up, from a process in any of its namespaces or outside.

    Raises:
        NetworkSpecError: the description is wrong.
        PrivilegeError: the network belongs to root, and this process does not run as root.
        NetworkError: the network is not up, or was brought up with another description.
    """
    network = EmulatedNetwork(read_spec(spec_path))
    _check_up(network.spec.name)
    if network.status().spec_sha256 != hashlib.sha256(spec_path.read_bytes()).hexdigest():
        raise NetworkError(
            f"the network '{network.spec.name}' was brought up with another description than {spec_path}: "
            f"'wdmoe-testbed net down --name {network.spec.name}' first"
        )
    return network


def attach_by_name(name: str | None) -> EmulatedNetwork:
    """Connect to the network with that name, or without a name to the only one.

    Raises:
        PrivilegeError: the network belongs to root, and this process does not run as root.
        NetworkError: the network is not up, or several are up and no name is given.
    """
    if name is None:
        name = only_name(sorted(set(state.known())))
    _check_up(name)
    return EmulatedNetwork(read_spec(State(name).spec))


def only_name(names: list[str]) -> str:
    """The only one of `names`.

    Raises:
        NetworkError: there is no name, or more than one.
    """
    if not names:
        raise NetworkError("no emulated network is up: 'wdmoe-testbed net up SPEC' brings one up")
    if len(names) > 1:
        raise NetworkError(f"several networks are up, choose one with --name: {', '.join(names)}")
    return names[0]


def leftovers() -> list[str]:
    """Names of networks that are up or left something behind after a crash.

    Raises:
        PrivilegeError: the networks belong to root, and this process does not run as root.
    """
    return sorted({*state.known(), *namespaces.existing()})


def down(name: str) -> None:
    """End a network and remove its namespaces and files, also after a crash.

    Raises:
        PrivilegeError: this process lacks the rights.
        NetworkError: its relay does not end.
    """
    namespaces.check_privileges()
    with state.locked(name) as files:
        _clean(name, files)


@contextmanager
def emulated(spec_path: Path) -> Iterator[EmulatedNetwork]:
    """Bring a network up for the duration of the context.

    Raises:
        NetworkSpecError: the description is wrong.
        PrivilegeError: this process lacks the rights.
        NetworkError: a network with that name is up already, or this one does not come up.
    """
    network = up(spec_path, owned=True)
    try:
        yield network
    finally:
        down(network.spec.name)


def _enter(network: str, host: str) -> list[str]:
    return ["nsenter", f"--net={namespaces.FOLDER / namespaces.namespace(network, host)}", "--"]


def _check_up(name: str) -> None:
    if name not in state.known():
        raise NetworkError(f"the network '{name}' is not up: 'wdmoe-testbed net up SPEC' brings it up")
    files = State(name)
    if files.relay() is None:
        raise NetworkError(
            f"the network '{name}' has crashed ({_last_log_line(files)}): "
            f"'wdmoe-testbed net down --name {name}' cleans up"
        )


def _start(name: str, files: State, *, owned: bool) -> None:
    owner = [str(os.getpid())] if owned else []
    ready_fd, child_fd = os.pipe()
    try:
        try:
            with files.log.open("ab") as log:
                # setsid --fork makes init the parent of the relay, so this process need not wait for it.
                subprocess.run(
                    ["setsid", "--fork", sys.executable, "-m", "testbed.network.daemon", name, str(child_fd), *owner],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(child_fd,), timeout=_READY_S,
                    check=True,
                )  # fmt: skip
        finally:
            os.close(child_fd)
        answer = _read_all(ready_fd, _READY_S)
    finally:
        os.close(ready_fd)
    if answer != READY:
        raise NetworkError(f"the network '{name}' does not come up: {answer or _last_log_line(files)}")


def _last_log_line(files: State) -> str:
    try:
        lines = files.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except FileNotFoundError:
        lines = []
    return lines[-1] if lines else "its log is empty"


def _read_all(fileno: int, timeout_s: float) -> str:
    """Text that arrives until the other end is closed; empty if that takes longer than `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    received = b""
    while select.select([fileno], (), (), max(0.0, deadline - time.monotonic()))[0]:
        part = os.read(fileno, 4096)
        if not part:
            return received.decode(errors="replace")
        received += part
    return ""


def _clean(name: str, files: State) -> None:
    process = files.relay()
    if process is not None:
        try:
            process.terminate()
            if psutil.wait_procs([process], timeout=_STOP_S)[1]:
                process.kill()
                if psutil.wait_procs([process], timeout=_STOP_S)[1]:
                    raise NetworkError(f"the relay of the network '{name}' (process {process.pid}) does not end")
        except psutil.AccessDenied:
            raise PrivilegeError(f"the network '{name}' belongs to another user: run as root") from None
        except psutil.NoSuchProcess:
            pass
    for namespace in namespaces.existing().get(name, []):
        namespaces.remove(namespace)
    files.remove()
