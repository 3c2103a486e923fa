"""Files of running networks: one folder per network, accessible to root only."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil
from msgspec import Struct

from common.jsonl import decode_json
from testbed.errors import NetworkError, PrivilegeError

ROOT = Path("/run/wdmoe-net")
_LOCK_S = 30.0
_POLL_S = 0.01


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
    files, path = State(name), ROOT / f"{name}.lock"
    fd = _lock(path, name)
    try:
        yield files
    finally:
        if not files.folder.exists():
            path.unlink(missing_ok=True)
        os.close(fd)


def _lock(path: Path, name: str) -> int:
    """Open and lock a file: the one that has this path then, because the last holder of the lock may have removed it.

    Not filelock's, which does not look whether its file is still there.
    """
    until_s = time.monotonic() + _LOCK_S
    while time.monotonic() < until_s:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        os.close(fd)
        time.sleep(_POLL_S)
    raise NetworkError(f"another process is bringing the network '{name}' up or down")
