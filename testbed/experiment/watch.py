"""Watches a run beside its measuring: nodes by their status documents, this machine by itself; writes alerts.

A thread with a connection of its own: it notices what happens while the runner is stuck, and it costs the runner
nothing but a wake-up per status document. What it saw last lies in `live.json`, for `status --follow`.
"""

import logging
import os
import secrets
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import msgspec
import psutil
from msgspec import Struct

from bs_coordinator.nodes.telemetry_inbox import Arrived, TelemetryInbox
from common.errors import StorageError
from edge_node.limits import processor_celsius
from testbed.experiment.alerts import STATION, Alerts, Change, Progress, Seen
from testbed.experiment.baselines import Route
from testbed.experiment.rundir import RunDir
from wire import status
from wire.broker_url import BrokerAddress
from wire.errors import BrokerError, FrameError
from wire.status import NodeStatus
from wire.telemetry import Telemetry
from wire.topics import Topics
from wire.transport import Message, Transport
from wire.transports import connect

log = logging.getLogger(__name__)

LIVE = "live.json"
_EVERY_S = 1.0
_RECONNECT_S = 5.0
_JOIN_S = 10.0
_CLOCK_SAMPLES = 20
_SAMPLE_AGE_MS = 1500.0
"""Telemetry is read in a process of its own and sent with the next tick, a second later at most."""


class LiveNode(Struct, frozen=True, kw_only=True):
    """One node as it was last seen."""

    node: str
    online: bool
    reason: str = ""
    silent_s: float = 0.0
    celsius: float | None = None
    available_bytes: int | None = None
    signal_dbm: float | None = None


class Live(Struct, frozen=True, kw_only=True):
    """A running run as it was last seen.

    Attributes:
        steps: of the model since this session began.
    """

    unix_ns: int
    steps: int
    rss_bytes: int
    disk_free_bytes: int
    nodes: list[LiveNode]


class Watch:
    """The watching thread's view, and what the runner tells it."""

    def __init__(self, run: RunDir, say: Callable[[str], None]) -> None:
        """Nothing is watched yet."""
        self._run, self._say = run, say
        self._alerts = Alerts(run.plan.limits)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._target: tuple[BrokerAddress, str] | None = None
        self._transport: Transport | None = None
        self._address: BrokerAddress | None = None
        self._retry_s = 0.0
        self._broker = ""
        self._nodes: dict[str, tuple[NodeStatus, float]] = {}
        self._telemetry = TelemetryInbox()
        self._late_ms: dict[str, deque[float]] = {}
        self._steps = 0
        self._stepped_s: float | None = None
        self._rss_bytes: int | None = None
        self._steady_offset_s = time.time() - time.monotonic()

    @contextmanager
    def running(self) -> Iterator["Watch"]:
        """Watch for as long as the context."""
        thread = threading.Thread(target=self._loop, name="watch", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join(_JOIN_S)

    def step(self) -> None:
        """The model has made a step. Cheap: called on the hot path."""
        self._steps += 1
        self._stepped_s = time.monotonic()

    def pausing(self) -> None:
        """Until the next step there is nothing to expect."""
        self._stepped_s = None

    def cell_ended(self) -> None:
        """A cell's rows are on disk; the first one's end is what memory is compared with."""
        self._rss_bytes = self._rss_bytes or psutil.Process().memory_info().rss

    def follow(self, address: BrokerAddress, cluster: str) -> None:
        """These nodes from now on."""
        with self._lock:
            self._target, self._nodes, self._retry_s = (address, cluster), {}, 0.0
            self._telemetry, self._late_ms = TelemetryInbox(), {}

    def unfollow(self) -> None:
        """No nodes: their end is meant."""
        with self._lock:
            self._target, self._nodes, self._broker = None, {}, ""

    def routes(self) -> dict[str, Route | None]:
        """By node online how it reaches the broker, as far as it says."""
        with self._lock:
            samples = self._telemetry.latest()
            return {
                name: route_of(samples[name].telemetry if name in samples else None)
                for name, (document, _) in self._nodes.items()
                if document.online
            }

    def _loop(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                target = self._target
            try:
                self._listen(target, _EVERY_S)
                self._look()
            except (StorageError, OSError) as error:
                log.warning("%s", error)  # the runner meets the same and ends the run
        self._disconnect()

    def _listen(self, target: tuple[BrokerAddress, str] | None, seconds: float) -> None:
        """Take in statuses for a while."""
        deadline = time.monotonic() + seconds
        if target is None:
            self._disconnect()
            self._stop.wait(seconds)
            return
        try:
            transport = self._connected(target)
            while transport and (left_s := deadline - time.monotonic()) > 0 and not self._stop.is_set():
                message = transport.receive(left_s)
                if message and not self._take(message, target):
                    return
        except BrokerError as error:
            self._disconnect()
            with self._lock:
                if target is self._target:  # else its end is meant
                    self._broker, self._retry_s = str(error), time.monotonic() + _RECONNECT_S
        self._stop.wait(max(0.0, deadline - time.monotonic()))

    def _connected(self, target: tuple[BrokerAddress, str]) -> Transport | None:
        if self._transport is not None and self._address != target[0]:
            self._disconnect()
        if self._transport is None and time.monotonic() >= self._retry_s:
            transport = connect(target[0], f"wdmoe-watch-{secrets.token_hex(4)}", timeout_s=_RECONNECT_S)
            self._transport, self._address = transport, target[0]
            topics = Topics(target[1])
            transport.subscribe(topics.status("+"), qos=1, timeout_s=_RECONNECT_S)
            transport.subscribe(topics.telemetry("+"), timeout_s=_RECONNECT_S)
            self._broker = ""
        return self._transport

    def _disconnect(self) -> None:
        if self._transport is not None:
            with suppress(BrokerError):
                self._transport.close()
            self._transport = None

    def _take(self, message: Message, target: tuple[BrokerAddress, str]) -> bool:
        """Take in a message; False if these nodes are not to be watched any more."""
        topics = Topics(target[1])
        node = topics.node_of_status(message.topic)
        teller = topics.node_of_telemetry(message.topic)
        document = None
        if node is not None and message.payload:
            with suppress(FrameError):  # the runner counts them
                document = status.decode_status(message.payload, node)
        with self._lock:
            if target is not self._target:
                return False
            if teller is not None:
                self._telemetry.put(teller, message)
            if node is not None and document is not None and not document.refused:
                self._nodes[node] = document, time.monotonic()
        return True

    def _look(self) -> None:
        with self._lock:
            told = self._telemetry.latest()
            for sample in self._telemetry.drain():
                late = self._late_ms.setdefault(sample.telemetry.node, deque(maxlen=_CLOCK_SAMPLES))
                late.append((sample.telemetry.unix_ns - sample.unix_ns) / 1e6)
            machines = [_seen(*entry, told.get(name), self._clock_ms(name)) for name, entry in self._nodes.items()]
            live = [_live(*entry, told.get(name)) for name, entry in sorted(self._nodes.items())]
        rss_bytes = psutil.Process().memory_info().rss
        stepped_s = self._stepped_s
        progress = Progress(
            quiet_s=None if stepped_s is None else time.monotonic() - stepped_s,
            growth_bytes=None if self._rss_bytes is None else rss_bytes - self._rss_bytes,
            broker=self._broker,
        )
        disk_free_bytes = shutil.disk_usage(self._run.path).free
        drift_s = time.time() - time.monotonic() - self._steady_offset_s
        station = Seen(
            STATION,
            celsius=processor_celsius(),
            disk_free_bytes=disk_free_bytes,
            clock_ms=1e3 * drift_s,
        )
        self._tell(self._alerts.update([station, *machines], progress))
        document = Live(
            unix_ns=time.time_ns(), steps=self._steps, rss_bytes=rss_bytes, disk_free_bytes=disk_free_bytes,
            nodes=live,
        )  # fmt: skip
        # Not synced to disk: it is worth nothing after a crash.
        path = self._run.path / LIVE
        temporary = path.with_name(f".{LIVE}.{os.getpid()}")
        try:
            temporary.write_bytes(msgspec.json.encode(document))
            temporary.replace(path)
        except OSError as error:
            raise StorageError(f"can't write {path}: {error.strerror}") from error

    def _clock_ms(self, node: str) -> float | None:
        """A node's clock less ours. One way only: a sample that was late looks like a clock that is behind, so the
        quickest of the last ones counts."""
        late = self._late_ms.get(node, ())
        return max(late) if len(late) == _CLOCK_SAMPLES else None

    def _tell(self, changes: Sequence[Change]) -> None:
        for key, begins, detail in changes:
            self._run.event("alert" if begins else "alert_over", kind=key.kind, subject=key.subject, detail=detail)
            self._say(f"   {'alert' if begins else 'over'}: {key.kind}, {key.subject}: {detail}")


def route_of(sample: Telemetry | None) -> Route | None:
    """How a node reaches the broker, None where it does not say."""
    if sample is None or sample.route is None:
        return None
    return "wifi" if sample.wifi and sample.wifi.interface == sample.route else "wired"


def _seen(document: NodeStatus, heard_s: float, arrived: Arrived | None, clock_ms: float | None) -> Seen:
    machine, sample = document.machine, arrived.telemetry if arrived else None
    return Seen(
        document.node,
        silent_s=time.monotonic() - heard_s if document.online else 0.0,
        gone="" if document.online else document.reason or "offline",
        rival=document.rival,
        celsius=sample.thermal.soc_celsius if sample else None,
        throttled=sample.thermal.throttling_now if sample else None,
        disk_free_bytes=machine.disk_free_bytes if machine else None,
        clock_ms=clock_ms,
        clock_error_ms=_SAMPLE_AGE_MS,
    )


def _live(document: NodeStatus, heard_s: float, arrived: Arrived | None) -> LiveNode:
    sample = arrived.telemetry if arrived else None
    return LiveNode(
        node=document.node,
        online=document.online,
        reason=document.reason,
        silent_s=time.monotonic() - heard_s,
        celsius=sample.thermal.soc_celsius if sample else None,
        available_bytes=document.machine.available_bytes if document.machine else None,
        signal_dbm=sample.wifi.rssi_dbm if sample and sample.wifi else None,
    )


def read_live(run: RunDir) -> Live | None:
    """What the watcher of a run saw last, or None."""
    try:
        return msgspec.json.decode((run.path / LIVE).read_bytes(), type=Live)
    except (OSError, msgspec.DecodeError):
        return None
