"""Files of running networks: one folder per network, accessible to root only."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil
from filelock import FileLock, Timeout
from msgspec import Struct

from common.jsonl import decode_json
from testbed.errors import NetworkError, PrivilegeError

ROOT = Path("/run/wdmoe-net")
_LOCK_S = 30.0


class _Pid(Struct, frozen=True):
    """Identifies a process even if its pid is reused.

    Attributes:
        started: start time according to the kernel, Unix seconds.
    """

    pid: int
    started: float


class State:
    """The files of one network.

    Args:
        name: name of the network.
    """

    def __init__(self, name: str) -> None:
        self.folder = ROOT / name
        self.spec = self.folder / "spec.yaml"
        self.control = self.folder / "control.sock"
        self.truth = self.folder / "truth.jsonl"
        self.log = self.folder / "relay.log"
        self._pid = self.folder / "relay.pid"

    def write_pid(self) -> None:
        """Record this process as the network's relay."""
        process = psutil.Process()
        temporary = self._pid.with_suffix(".tmp")
        temporary.write_bytes(msgspec.json.encode(_Pid(process.pid, process.create_time())))
        temporary.rename(self._pid)

    def relay(self) -> psutil.Process | None:
        """The network's relay; None if it is not running."""
        try:
            noted = decode_json(self._pid.read_bytes(), _Pid)
            process = psutil.Process(noted.pid)
            alive = process.create_time() == noted.started and process.status() != psutil.STATUS_ZOMBIE
        except (FileNotFoundError, msgspec.DecodeError, psutil.NoSuchProcess):
            return None
        return process if alive else None

    def remove(self) -> None:
        """Delete the network's files and its folder; unknown files in the folder are kept."""
        for path in (self.spec, self.control, self.truth, self.log, self._pid, self._pid.with_suffix(".tmp")):
            path.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self.folder.rmdir()


def known() -> list[str]:
    """Names of networks that have a folder, whether running or crashed.

    Raises:
        PrivilegeError: the folders belong to root, and this process does not run as root.
    """
    try:
        return sorted(path.name for path in ROOT.iterdir() if path.is_dir())
    except FileNotFoundError:
        return []
    except PermissionError:
        raise PrivilegeError(f"emulated networks ({ROOT}) belong to root: run as root") from None


@contextmanager
def locked(name: str) -> Iterator[State]:
    """The files of a network, locked against other processes that bring it up or down.

    Raises:
        NetworkError: another process holds the lock for too long.
    """
    ROOT.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = FileLock(ROOT / f"{name}.lock", mode=0o600)
    try:
        lock.acquire(timeout=_LOCK_S)
    except Timeout:
        raise NetworkError(f"another process is bringing the network '{name}' up or down") from None
    try:
        yield State(name)
    finally:
        lock.release()
