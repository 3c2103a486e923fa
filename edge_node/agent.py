"""The node on the network: announces itself, answers frames, leaves cleanly.

Two processes with one id would answer each other's work and hide each other's death, so a node looks for its
own id before it announces itself and keeps looking: of two, the one announced first stays.
"""

import logging
import os
import platform
import random
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import onnxruntime
import psutil

from common.systemd import notify
from edge_node.errors import DuplicateNodeError
from edge_node.experts.runtime import ExpertRuntime
from edge_node.limits import Limits
from edge_node.telemetry.process import EVERY_S as TELEMETRY_S
from edge_node.telemetry.process import TelemetryProcess
from edge_node.worker import Worker
from wire import __version__, status
from wire.broker_url import BrokerAddress
from wire.errors import BrokerAuthError, BrokerError, FrameError
from wire.experts import format_selector
from wire.mqtt import KEEPALIVE_S, LastWill, MqttTransport
from wire.status import DeviceFacts, Holding, Machine, NodeStatus, Residency, SocketFacts
from wire.topics import Topics
from wire.transport import Message, Transport

log = logging.getLogger(__name__)

HEARTBEAT_S = 3.0
"""How often the retained status is renewed: free memory for operators, and proof of life for a second process
that wants the same id."""
_CLAIM_S = 0.5
"""How long a fresh status may take to come back from the broker, when two nodes start at once."""
_RECONNECT_FIRST_S = 0.5
_RECONNECT_MOST_S = 5.0


class NodeAgent:
    """One node's life on a broker."""

    def __init__(
        self,
        *,
        node: str,
        topics: Topics,
        address: BrokerAddress,
        worker: Worker,
        holding: Holding,
        threads: int,
        limits: Limits | None = None,
        residency: Callable[[], Residency | None] = lambda: None,
        telemetry: bool = False,
        device: DeviceFacts | None = None,
        folder: Path = Path(),
    ) -> None:
        """Nothing is connected yet.

        Args:
            folder: of the bundle, whose disk's free space is told.
            limits: outside of which the node says that it is offline, and takes no work until it is within again.
            residency: of the experts, now.
            telemetry: tell every second of radio, temperatures and power.
            device: for the status.
        """
        self._device = device
        self._residency = residency
        self._node = node
        self._topics = topics
        self._address = address
        self._worker = worker
        self._holding = holding
        self._threads = threads
        self._limits = limits or Limits()
        self._folder = folder
        self._unfit = ""
        self._rival = ""
        self._boot_id = secrets.token_hex(8)
        self._since_unix_ms = 0
        self._telemetry = TelemetryProcess(node, self._boot_id, address.host, address.port) if telemetry else None

    def run(self, stop: threading.Event, *, on_ready: Callable[[], None] | None = None) -> None:
        """Serve until `stop` is set. A lost broker is looked for again, with jittered back-off.

        Raises:
            BrokerError: the broker can't be reached at the first try, or refuses this node.
            DuplicateNodeError: another live process has this id.
        """
        if self._telemetry:
            self._telemetry.start()
        try:
            self._run(stop, on_ready)
        finally:
            if self._telemetry:
                self._telemetry.close()

    def _run(self, stop: threading.Event, on_ready: Callable[[], None] | None) -> None:
        transport = self._connect()
        notify("READY=1")
        if on_ready:
            on_ready()
        while True:
            try:
                self._serve(transport, stop)
                self._leave(transport)
                return
            except BrokerAuthError:
                raise
            except DuplicateNodeError:
                # The status topic belongs to the other process: leave without touching what is retained there.
                self._tell_refused(transport)
                raise
            except BrokerError as error:
                log.warning("%s; reconnecting", error)
                transport.close()
            reconnected = self._reconnect(stop)
            if reconnected is None:
                return
            transport = reconnected

    def _connect(self) -> MqttTransport:
        will = LastWill(
            self._topics.status(self._node), status.encode_status(self._status("offline", "connection lost"))
        )
        client_id = f"wdmoe-{self._topics.cluster}-{self._node}-{self._boot_id}"
        transport = MqttTransport(self._address, client_id, will=will)
        try:
            transport.subscribe(self._topics.status(self._node), qos=1)
            self._refuse_if_taken(transport)
            transport.subscribe(self._topics.work(self._node))
            self._since_unix_ms = int(time.time() * 1000)
            self._announce(transport, confirm=True)
        except BrokerError:
            transport.close()
            raise
        except DuplicateNodeError:
            self._tell_refused(transport)
            raise
        return transport

    def _tell_refused(self, transport: MqttTransport) -> None:
        """The other process can tell who reads its status; our own log lies on a device that nobody looks at."""
        with suppress(BrokerError):
            document = msgspec.structs.replace(self._status("offline", "its id is in use"), refused=True)
            topic = self._topics.status(self._node)
            transport.publish_confirmed(topic, status.encode_status(document), retain=False, timeout_s=2.0)
        transport.close()

    def _refuse_if_taken(self, transport: Transport) -> None:
        """Raise if another process with our id is alive: its retained status says online and is renewed."""
        deadline = time.monotonic() + _CLAIM_S
        other: NodeStatus | None = None
        while (remaining := deadline - time.monotonic()) > 0:
            message = transport.receive(remaining)
            seen = self._other_status(message) if message else None
            if seen is None or seen.refused:
                continue
            if not seen.online:
                other, deadline = None, time.monotonic() + _CLAIM_S
            elif message and not message.retained:
                raise self._taken(seen)
            elif other is None:
                # Retained: alive, or dead for less than the broker's patience. A heartbeat or its will tells.
                other, deadline = seen, time.monotonic() + 1.5 * KEEPALIVE_S + HEARTBEAT_S
                log.info("id '%s' was last used on %s; making sure that it is gone", self._node, _where(seen))

    def _serve(self, transport: MqttTransport, stop: threading.Event) -> None:
        work_topic = self._topics.work(self._node)
        result_topic = self._topics.results(self._node)
        status_topic = self._topics.status(self._node)
        next_heartbeat = time.monotonic() + HEARTBEAT_S
        next_telemetry = 0.0
        seen_by_others = False
        while not stop.is_set():
            message = transport.receive(min(0.2, max(0.0, next_heartbeat - time.monotonic())))
            if message and message.topic == work_topic:
                if message.retained:
                    self._worker.counts["dropped:retained"] += 1
                elif (reply := self._worker.answer(message.payload, message.arrived_ns)) is not None:
                    transport.publish(result_topic, reply)
            elif message and (other := self._other_status(message)):
                if other.refused:
                    self._rival = f"{_where(other)} at {time.strftime('%Y-%m-%d %H:%M:%S %z')}"
                    log.error("another process on %s tried to use our id '%s'", _where(other), self._node)
                elif other.online:
                    self._settle(other)
            elif message and message.topic == status_topic and self._boot_id.encode() in message.payload:
                seen_by_others = True
            now = time.monotonic()
            if self._telemetry and now >= next_telemetry:
                next_telemetry = now + TELEMETRY_S
                if (sample := self._telemetry.take()) is not None:
                    transport.publish(self._topics.telemetry(self._node), sample)
            if now >= next_heartbeat:
                if not seen_by_others:
                    # A broker's access list drops what it does not allow without a word.
                    raise BrokerAuthError(
                        f"the broker at {self._address} does not pass on {status_topic}: does its access list allow "
                        f"user '{self._address.user}' to be node '{self._node}'?"
                    )
                notify("WATCHDOG=1")
                self._look_at_limits()
                self._announce(transport, confirm=False)
                next_heartbeat = time.monotonic() + HEARTBEAT_S

    def _look_at_limits(self) -> None:
        before, self._unfit = self._unfit, self._limits.unfit()
        if self._unfit and not before:
            log.warning("%s: taking no work until that is over", self._unfit)
        elif before and not self._unfit:
            log.info("taking work again")

    def _settle(self, other: NodeStatus) -> None:
        """Two of us announced themselves at once: the earlier one stays."""
        if (other.since_unix_ms, other.boot_id) < (self._since_unix_ms, self._boot_id):
            raise self._taken(other)
        log.error("another process on %s tries to use our id '%s'", _where(other), self._node)

    def _other_status(self, message: Message) -> NodeStatus | None:
        """The status in `message` if it is one of another process with our id."""
        if message.topic != self._topics.status(self._node) or not message.payload:
            return None
        try:
            seen = status.decode_status(message.payload, self._node)
        except FrameError as error:
            self._worker.counts[f"dropped:{error.reason}"] += 1
            return None
        return seen if seen.boot_id != self._boot_id else None

    def _taken(self, other: NodeStatus) -> DuplicateNodeError:
        return DuplicateNodeError(
            f"node id '{self._node}' is in use on {_where(other)}: choose another --id or stop that one"
        )

    def _announce(self, transport: MqttTransport, *, confirm: bool) -> None:
        topic = self._topics.status(self._node)
        state = "offline" if self._unfit else "online"
        payload = status.encode_status(self._status(state, self._unfit, uplink=transport.socket_facts()))
        if confirm:
            transport.publish_confirmed(topic, payload, retain=True)
        else:
            transport.publish(topic, payload, qos=1, retain=True)

    def _leave(self, transport: MqttTransport) -> None:
        payload = status.encode_status(self._status("offline", "stopped"))
        transport.publish_confirmed(self._topics.status(self._node), payload, retain=True, timeout_s=2.0)
        transport.close()

    def _reconnect(self, stop: threading.Event) -> MqttTransport | None:
        delay_s = _RECONNECT_FIRST_S
        while not stop.wait(random.uniform(0, delay_s)):  # noqa: S311 - jitter, not a secret
            try:
                transport = self._connect()
            except BrokerAuthError:
                raise
            except BrokerError as error:
                notify("WATCHDOG=1")  # a broker that is away is no reason to be restarted
                delay_s = min(2 * delay_s, _RECONNECT_MOST_S)
                log.warning("%s; next try within %.1f s", error, delay_s)
                continue
            log.info("connected to %s again", self._address)
            return transport
        return None

    def _status(self, state: str, reason: str = "", uplink: SocketFacts | None = None) -> NodeStatus:
        online = state == "online"
        return NodeStatus(
            schema=status.SCHEMA,
            node=self._node,
            boot_id=self._boot_id,
            state="online" if online else "offline",
            since_unix_ms=self._since_unix_ms,
            reason=reason,
            holding=self._holding if online else None,
            machine=self._machine(),
            uplink=uplink,
            device=self._device,
            residency=self._residency() if online else None,
            rival=self._rival,
        )

    def _machine(self) -> Machine:
        memory = psutil.virtual_memory()
        return Machine(
            host=socket.gethostname(),
            pid=os.getpid(),
            arch=platform.machine(),
            cpus=os.cpu_count() or 1,
            threads=self._threads,
            ram_bytes=memory.total,
            available_bytes=memory.available,
            wdmoe=__version__,
            onnxruntime=onnxruntime.__version__,
            disk_free_bytes=shutil.disk_usage(self._folder).free,
        )


def residency_status(runtime: ExpertRuntime) -> Residency | None:
    """What a runtime's status says of experts that it can't keep in memory; None where it keeps all."""
    if runtime.most_loaded is None:
        return None
    loads = runtime.loads
    return Residency(
        loaded=format_selector(runtime.loaded),
        most_loaded=runtime.most_loaded,
        loads=loads.count,
        load_ms=loads.ns / max(1, loads.count) / 1e6,
        evictions=loads.evictions,
    )


def _where(other: NodeStatus) -> str:
    machine = other.machine
    return f"{machine.host} (process {machine.pid})" if machine else "another host"
