"""Where a running network keeps what others need to find it: one folder per network, for root only."""

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

from testbed.errors import NetworkError, PrivilegeError

ROOT = Path("/run/wdmoe-net")
_LOCK_S = 30.0


class _Pid(Struct, frozen=True):
    """A process, told apart from a later one of the same number.

    Attributes:
        started: as the kernel tells it, seconds of the Unix clock.
    """

    pid: int
    started: float


class State:
    """The files of one network.

    Args:
        name: the network's.
    """

    def __init__(self, name: str) -> None:
        self.folder = ROOT / name
        self.spec = self.folder / "spec.yaml"
        self.control = self.folder / "control.sock"
        self.truth = self.folder / "truth.jsonl"
        self.log = self.folder / "relay.log"
        self._pid = self.folder / "relay.pid"

    def write_pid(self) -> None:
        """Note that this process is the network's relay."""
        process = psutil.Process()
        temporary = self._pid.with_suffix(".tmp")
        temporary.write_bytes(msgspec.json.encode(_Pid(process.pid, process.create_time())))
        temporary.rename(self._pid)

    def relay(self) -> psutil.Process | None:
        """The network's relay, if it lives."""
        try:
            noted = msgspec.json.decode(self._pid.read_bytes(), type=_Pid)
            process = psutil.Process(noted.pid)
            alive = process.create_time() == noted.started and process.status() != psutil.STATUS_ZOMBIE
        except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError, psutil.NoSuchProcess):
            return None
        return process if alive else None

    def remove(self) -> None:
        """Delete the files, and only these."""
        for path in (self.spec, self.control, self.truth, self.log, self._pid, self._pid.with_suffix(".tmp")):
            path.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self.folder.rmdir()


def known() -> list[str]:
    """Networks that have a folder, running or crashed.

    Raises:
        PrivilegeError: they belong to root, and this process does not.
    """
    try:
        return sorted(path.name for path in ROOT.iterdir() if path.is_dir())
    except FileNotFoundError:
        return []
    except PermissionError:
        raise PrivilegeError(f"emulated networks ({ROOT}) belong to root: run as root") from None


@contextmanager
def locked(name: str) -> Iterator[State]:
    """The files of a network while nobody else brings it up or down.

    Raises:
        NetworkError: somebody else does, and does not end.
    """
    ROOT.mkdir(mode=0o700, parents=True, exist_ok=True)
    deadline = time.monotonic() + _LOCK_S
    lock = os.open(ROOT / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise NetworkError(f"somebody else is bringing the network '{name}' up or down") from None
                time.sleep(0.05)
        yield State(name)
    finally:
        os.close(lock)
