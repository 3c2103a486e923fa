"""`live.json`: the state of a running run as its watcher last saw it. `status --follow` reads it."""

import os

import msgspec
from msgspec import Struct

from common.console import describe_os_error
from common.errors import StorageError
from common.jsonl import decode_json
from testbed.run_directory.directory import RunDir

LIVE = "live.json"


class LiveNode(Struct, frozen=True, kw_only=True):
    """One node.

    Attributes:
        reason: why the node is offline; empty if it is online.
        silent_s: time since its last status.
        available_bytes: free memory.
    """

    node: str
    online: bool
    reason: str = ""
    silent_s: float = 0.0
    celsius: float | None = None
    available_bytes: int | None = None
    signal_dbm: float | None = None


class Live(Struct, frozen=True, kw_only=True):
    """A run at one moment.

    Attributes:
        steps: steps of the model since this session began.
        rss_bytes: memory of the runner.
    """

    unix_ns: int
    steps: int
    rss_bytes: int
    disk_free_bytes: int
    nodes: list[LiveNode]


def write_live(run: RunDir, live: Live) -> None:
    """Replace the file.

    Raises:
        StorageError: it can't be written.
    """
    # Not synced to disk: after a crash the file is worthless.
    path = run.path / LIVE
    temporary = path.with_name(f".{LIVE}.{os.getpid()}")
    try:
        temporary.write_bytes(msgspec.json.encode(live))
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"can't write {path}: {describe_os_error(error)}") from error


def read_live(run: RunDir) -> Live | None:
    """The state that the watcher wrote last; None if there is none."""
    try:
        return decode_json((run.path / LIVE).read_bytes(), Live)
    except (OSError, msgspec.DecodeError):
        return None
