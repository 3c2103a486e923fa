"""Watches nodes and base station while a run measures, and raises alerts.

The watch is a thread with its own connection to the broker, so it also works while the runner is stuck. It costs the
runner one wake-up per status document. It writes the latest state to `live.json` for `status --follow`.
"""

import logging
import secrets
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import psutil

from bs_coordinator.nodes.admission import Admission
from bs_coordinator.nodes.telemetry_inbox import ReceivedTelemetry, TelemetryInbox
from common.errors import StorageError
from edge_node.limits import processor_celsius
from testbed.experiment.alerts import BASE_STATION, Alerts, Change, MachineState, RunnerState
from testbed.experiment.baselines import Route
from testbed.run_directory.directory import RunDir
from testbed.run_directory.live import Live, LiveNode, write_live
from wire import status
from wire.broker_address import BrokerAddress
from wire.errors import BrokerError, FrameError
from wire.status import NodeStatus
from wire.telemetry import Telemetry
from wire.topics import Topics
from wire.transport import Message, Transport
from wire.transports import connect

log = logging.getLogger(__name__)

_EVERY_S = 1.0
_RECONNECT_S = 5.0
_JOIN_S = 10.0
_CLOCK_SAMPLES = 20
_SAMPLE_AGE_MS = 1500.0
"""A telemetry sample may be this old when it is sent: a separate process reads the sensors about once a second."""


class Watch:
    """The watching thread, with the methods by which the runner reports its progress."""

    def __init__(self, run: RunDir, on_progress: Callable[[str], None]) -> None:
        """Prepare to watch; `running` starts the thread.

        Args:
            on_progress: called with a line for each alert that begins or ends.
        """
        self._run, self._on_progress = run, on_progress
        self._alerts = Alerts(run.plan.limits)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._target: tuple[BrokerAddress, str] | None = None
        self._transport: Transport | None = None
        self._address: BrokerAddress | None = None
        self._retry_s = 0.0
        self._broker_problem = ""
        self._nodes: dict[str, tuple[NodeStatus, float]] = {}
        self._telemetry = TelemetryInbox()
        self._admission = Admission("statuses")
        self._late_ms: dict[str, deque[float]] = {}
        self._steps = 0
        self._stepped_s: float | None = None
        self._rss_bytes: int | None = None
        self._steady_offset_s = time.time() - time.monotonic()

    @contextmanager
    def running(self) -> Iterator["Watch"]:
        """Watch for the duration of the context."""
        thread = threading.Thread(target=self._loop, name="watch", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join(_JOIN_S)

    def step(self) -> None:
        """Report a step of the model; cheap enough for the hot path."""
        self._steps += 1
        self._stepped_s = time.monotonic()

    def pausing(self) -> None:
        """Expect no step of the model until `step` is called again."""
        self._stepped_s = None

    def cell_ended(self) -> None:
        """Report the end of a cell; growth of memory counts from the end of the first one."""
        self._rss_bytes = self._rss_bytes or psutil.Process().memory_info().rss

    def follow(self, address: BrokerAddress, cluster: str) -> None:
        """Watch these nodes from now on."""
        with self._lock:
            self._target, self._nodes, self._retry_s = (address, cluster), {}, 0.0
            self._telemetry, self._admission, self._late_ms = TelemetryInbox(), Admission("statuses"), {}

    def unfollow(self) -> None:
        """Stop watching nodes, before they are ended on purpose."""
        with self._lock:
            self._target, self._nodes, self._broker_problem = None, {}, ""

    def routes(self) -> dict[str, Route | None]:
        """How each node that is online reaches the broker; None for nodes that don't report it."""
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
                log.warning("%s", error)  # the runner gets the same error and ends the run
        self._disconnect()

    def _listen(self, target: tuple[BrokerAddress, str] | None, seconds: float) -> None:
        """Receive status and telemetry messages for a while."""
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
                if target is self._target:  # else the broker was ended on purpose
                    self._broker_problem, self._retry_s = str(error), time.monotonic() + _RECONNECT_S
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
            self._broker_problem = ""
        return self._transport

    def _disconnect(self) -> None:
        if self._transport is not None:
            with suppress(BrokerError):
                self._transport.close()
            self._transport = None

    def _take(self, message: Message, target: tuple[BrokerAddress, str]) -> bool:
        """Keep the content of a message; returns False if these nodes are no longer watched."""
        topics = Topics(target[1])
        node = topics.node_of_status(message.topic)
        sampled = topics.node_of_telemetry(message.topic)
        document = None
        if node is not None and message.payload and not self._admission.refusal(node, message.arrived_ns / 1e9):
            with suppress(FrameError):  # the runner counts malformed messages
                document = status.decode_status(message.payload, node)
        with self._lock:
            if target is not self._target:
                return False
            if sampled is not None:
                self._telemetry.put(sampled, message)
            if node is not None and document is not None and not document.refused:
                self._nodes[node] = document, time.monotonic()
        return True

    def _look(self) -> None:
        with self._lock:
            latest = self._telemetry.latest()
            for sample in self._telemetry.drain():
                late = self._late_ms.setdefault(sample.telemetry.node, deque(maxlen=_CLOCK_SAMPLES))
                late.append((sample.telemetry.unix_ns - sample.unix_ns) / 1e6)
            machines = [_state(*entry, latest.get(name), self._clock_ms(name)) for name, entry in self._nodes.items()]
            live = [_live(*entry, latest.get(name)) for name, entry in sorted(self._nodes.items())]
        rss_bytes = psutil.Process().memory_info().rss
        stepped_s = self._stepped_s
        runner = RunnerState(
            quiet_s=None if stepped_s is None else time.monotonic() - stepped_s,
            growth_bytes=None if self._rss_bytes is None else rss_bytes - self._rss_bytes,
            broker=self._broker_problem,
        )
        disk_free_bytes = shutil.disk_usage(self._run.path).free
        drift_s = time.time() - time.monotonic() - self._steady_offset_s
        base_station = MachineState(
            BASE_STATION,
            celsius=processor_celsius(),
            disk_free_bytes=disk_free_bytes,
            clock_ms=1e3 * drift_s,
        )
        self._report(self._alerts.update([base_station, *machines], runner))
        write_live(
            self._run,
            Live(
                unix_ns=time.time_ns(),
                steps=self._steps,
                rss_bytes=rss_bytes,
                disk_free_bytes=disk_free_bytes,
                nodes=live,
            ),
        )

    def _clock_ms(self, node: str) -> float | None:
        """A node's clock minus ours, from one-way telemetry.

        A delayed sample looks like a clock that is behind, so the fastest of the last samples counts.
        """
        late = self._late_ms.get(node, ())
        return max(late) if len(late) == _CLOCK_SAMPLES else None

    def _report(self, changes: Sequence[Change]) -> None:
        for key, begins, detail in changes:
            self._run.event("alert" if begins else "alert_over", kind=key.kind, subject=key.subject, detail=detail)
            self._on_progress(f"   {'alert' if begins else 'over'}: {key.kind}, {key.subject}: {detail}")


def route_of(sample: Telemetry | None) -> Route | None:
    """How a node reaches the broker; None if it doesn't report it."""
    if sample is None or sample.route is None:
        return None
    return "wifi" if sample.wifi and sample.wifi.interface == sample.route else "wired"


def _state(
    document: NodeStatus, heard_s: float, arrived: ReceivedTelemetry | None, clock_ms: float | None
) -> MachineState:
    machine, sample = document.machine, arrived.telemetry if arrived else None
    return MachineState(
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


def _live(document: NodeStatus, heard_s: float, arrived: ReceivedTelemetry | None) -> LiveNode:
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
