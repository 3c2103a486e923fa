"""The node on the network: announces itself, answers frames, leaves cleanly."""

import logging
import random
import threading
from collections.abc import Callable

from common.clock import SYSTEM_CLOCK, Clock
from common.systemd import notify
from edge_node.errors import DuplicateNodeError
from edge_node.home_assistant import Announcement
from edge_node.limits import DeviceLimits
from edge_node.node_id import NodeId
from edge_node.node_status import HEARTBEAT_S, StatusSource
from edge_node.telemetry.process import EVERY_S as TELEMETRY_S
from edge_node.telemetry.process import TelemetryProcess
from edge_node.worker import Worker
from wire import status, transports
from wire.broker_address import BrokerAddress
from wire.errors import BrokerAuthError, BrokerError
from wire.topics import Topics
from wire.transport import Connect, LastWill, Message, Transport

log = logging.getLogger(__name__)

_CONFIRMED_HEARTBEATS = 2
"""Statuses that a broker acknowledges but does not pass on to us, before we take that for a refusal."""
_RECONNECT_FIRST_S = 0.5
_RECONNECT_MOST_S = 5.0


class NodeAgent:
    """One node on a broker, from its announcement to its last status."""

    def __init__(
        self,
        *,
        about: StatusSource,
        topics: Topics,
        address: BrokerAddress,
        worker: Worker,
        limits: DeviceLimits | None = None,
        telemetry: bool = False,
        home_assistant: str | None = None,
        connect: Connect = transports.connect,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """Prepare to run; `run` connects.

        Args:
            about: makes the statuses; its node's id is unique in the cluster.
            address: of the broker.
            worker: answers frames.
            limits: outside of which the node announces that it is offline; it takes work again once it is within.
            telemetry: publish radio, temperatures and power every second.
            home_assistant: prefix of Home Assistant's discovery topics; the node is not announced there if None.
            connect: opens a connection to the broker.
            clock: for heartbeats, deadlines and waiting.
        """
        self._about = about
        self._node = node = about.node
        self._topics = topics
        self._address = address
        self._worker = worker
        self._limits = limits or DeviceLimits()
        self._open = connect
        self._clock = clock
        self._unfit = ""
        self._boot_id = worker.boot_id
        self._id = NodeId(about, topics.status(node), worker.boot_id, worker.counts, clock=clock)
        self._status_came_back = False
        device = about.device
        self._home_assistant = (
            Announcement(home_assistant, topics, node, model=f"edge node, {device.profile if device else 'unknown'}")
            if home_assistant
            else None
        )
        self._telemetry = TelemetryProcess(node, self._boot_id, address.host, address.port) if telemetry else None

    def run(self, stop: threading.Event, *, on_ready: Callable[[], None] | None = None) -> None:
        """Serve until `stop` is set. A lost connection is opened again, with jittered back-off.

        Args:
            on_ready: called once, when the node has been announced.

        Raises:
            BrokerError: the first connection fails, or the broker refuses this node.
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
            except DuplicateNodeError:
                # The retained status belongs to the other process: leave it as it is.
                self._id.report_refusal(transport)
                transport.close()
                raise
            except BrokerError as error:
                _raise_if_final(error)
                log.warning("%s; reconnecting", error)
                transport.close()
            reconnected = self._reconnect(stop)
            if reconnected is None:
                return
            transport = reconnected

    def _connect(self) -> Transport:
        will = LastWill(self._topics.status(self._node), status.encode_status(self._about.offline("connection lost")))
        client_id = f"wdmoe-{self._topics.cluster}-{self._node}-{self._boot_id}"
        transport = self._open(self._address, client_id, will=will)
        try:
            transport.subscribe(self._topics.status(self._node), qos=1)
            self._id.claim(transport)
            transport.subscribe(self._topics.work(self._node))
            self._about.since_unix_ms = self._clock.unix_ns() // 1_000_000
            self._announce(transport, confirm=True)
            self._show_at_home(transport)
        except BrokerError:
            transport.close()
            raise
        except DuplicateNodeError:
            self._id.report_refusal(transport)
            transport.close()
            raise
        return transport

    def _serve(self, transport: Transport, stop: threading.Event) -> None:
        clock = self._clock
        next_heartbeat = clock.monotonic_s() + HEARTBEAT_S
        next_telemetry = 0.0
        self._status_came_back = False
        silent = 0
        while not stop.is_set():
            message = transport.receive(min(0.2, max(0.0, next_heartbeat - clock.monotonic_s())))
            if message is not None:
                self._take(transport, message)
            now = clock.monotonic_s()
            if self._telemetry and now >= next_telemetry:
                next_telemetry = now + TELEMETRY_S
                if (sample := self._telemetry.take()) is not None:
                    transport.publish(self._topics.telemetry(self._node), sample)
                    if self._home_assistant and self._home_assistant.take(sample):
                        self._show_at_home(transport)
            if now >= next_heartbeat:
                notify("WATCHDOG=1")
                self._check_limits()
                silent += not self._status_came_back
                if silent > _CONFIRMED_HEARTBEATS:
                    # A broker drops what its access list does not allow, without an error.
                    raise BrokerAuthError(
                        f"the broker at {self._address} does not pass on {self._topics.status(self._node)}: does its "
                        f"access list allow user '{self._address.user}' to be node '{self._node}'?"
                    )
                # Only a broker that acknowledges a status and does not pass it on drops it; any other may be slow.
                self._announce(transport, confirm=not self._status_came_back)
                next_heartbeat = clock.monotonic_s() + HEARTBEAT_S

    def _take(self, transport: Transport, message: Message) -> None:
        """Answer a frame, or take note of a status on our topic."""
        if message.topic == self._topics.work(self._node):
            if message.retained:
                self._worker.counts["dropped:retained"] += 1
            elif (reply := self._worker.answer(message.payload, message.arrived_ns)) is not None:
                transport.publish(self._topics.results(self._node), reply)
        elif (
            not self._id.watch(message)
            and message.topic == self._topics.status(self._node)
            and self._boot_id.encode() in message.payload
        ):
            self._status_came_back = True

    def _check_limits(self) -> None:
        before, self._unfit = self._unfit, self._limits.unfit()
        if self._unfit and not before:
            log.warning("%s: taking no work until that has passed", self._unfit)
        elif before and not self._unfit:
            log.info("taking work again")

    def _announce(self, transport: Transport, *, confirm: bool) -> None:
        topic = self._topics.status(self._node)
        about, uplink = self._about, transport.socket_facts()
        work = about.work()
        payload = status.encode_status(
            about.offline(self._unfit, uplink, work) if self._unfit else about.online(uplink, work)
        )
        if confirm:
            transport.publish_confirmed(topic, payload, retain=True)
        else:
            transport.publish(topic, payload, qos=1, retain=True)

    def _show_at_home(self, transport: Transport) -> None:
        # At every connection, because a broker may have lost what it retained.
        if self._home_assistant:
            transport.publish(self._home_assistant.topic, self._home_assistant.document(), qos=1, retain=True)

    def _leave(self, transport: Transport) -> None:
        payload = status.encode_status(self._about.offline("stopped"))
        transport.publish_confirmed(self._topics.status(self._node), payload, retain=True, timeout_s=2.0)
        transport.close()

    def _reconnect(self, stop: threading.Event) -> Transport | None:
        delay_s = _RECONNECT_FIRST_S
        while not self._clock.wait(stop, random.uniform(0, delay_s)):  # noqa: S311 - jitter, not a secret
            try:
                transport = self._connect()
            except BrokerError as error:
                _raise_if_final(error)
                notify("WATCHDOG=1")  # systemd must not restart a node because its broker is away
                delay_s = min(2 * delay_s, _RECONNECT_MOST_S)
                log.warning("%s; next try within %.1f s", error, delay_s)
                continue
            log.info("connected to %s again", self._address)
            return transport
        return None


def _raise_if_final(error: BrokerError) -> None:
    if isinstance(error, BrokerAuthError) and error.final:
        raise error
