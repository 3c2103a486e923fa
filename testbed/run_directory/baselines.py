"""`baselines.jsonl`: how fast the parts of a system were on their own, at the start and end of each session."""

from typing import Literal

import msgspec
from msgspec import Struct

from common.console import describe_os_error
from common.errors import StorageError
from common.jsonl import decode_strict_json
from testbed.plan.schema import BaselineKind
from testbed.run_directory.directory import RunDir, read_run_lines
from testbed.run_directory.events import Nanoseconds

BASELINES_FILE = "baselines.jsonl"
Phase = Literal["start", "end"]


class Baseline(Struct, frozen=True, kw_only=True):
    """One baseline, or the reason why it was not measured.

    Attributes:
        session: number of the session (start of the runner), from 1.
        over: the network: `loopback`, a link profile, or how running nodes reach the broker.
        first_token_ns: time to the first token, prefill included.
        token_ns: time of each token after the first.
        broker_ms: median round trip of a small message through the broker.
        nodes_ms: round trip of one token, by node.
        why_not: why there are no numbers; empty if there are.
    """

    session: int
    phase: Phase
    kind: BaselineKind
    bundle: str
    unix_ns: Nanoseconds
    over: str = ""
    first_token_ns: Nanoseconds | None = None
    token_ns: list[Nanoseconds] = []
    broker_ms: float | None = None
    nodes_ms: dict[str, float] = {}
    why_not: str = ""


def read_baselines(run: RunDir) -> list[Baseline]:
    """All baselines of a run in order, without lines that a crash cut off.

    Raises:
        RunDirectoryError: a line is damaged.
    """
    path = run.path / BASELINES_FILE
    return read_run_lines(path, lambda line: decode_strict_json(line, Baseline))


def append_baseline(run: RunDir, baseline: Baseline) -> None:
    """Add a baseline to the run's file.

    Raises:
        StorageError: the file can't be written.
    """
    path = run.path / BASELINES_FILE
    try:
        with path.open("ab") as file:
            # The line break comes first: a crash may have cut off the line before.
            file.write((b"\n" if file.tell() else b"") + msgspec.json.encode(baseline))
    except OSError as error:
        raise StorageError(f"can't write {path}: {describe_os_error(error)}") from error
