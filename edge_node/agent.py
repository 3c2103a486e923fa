"""The node on the network: announces itself, answers frames, leaves cleanly.

Two processes with the same id would answer each other's requests and hide each other's death. A node therefore looks
for its own id before it announces itself, and keeps looking: of two processes, the one that was announced first stays.
"""

import logging
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import msgspec

from common.clock import SYSTEM_CLOCK, Clock
from common.systemd import notify
from edge_node.errors import DuplicateNodeError
from edge_node.home_assistant import Announcement
from edge_node.limits import DeviceLimits
from edge_node.node_status import StatusSource
from edge_node.telemetry.process import EVERY_S as TELEMETRY_S
from edge_node.telemetry.process import TelemetryProcess
from edge_node.worker import Worker
from wire import status, transports
from wire.broker_address import BrokerAddress
from wire.errors import BrokerAuthError, BrokerError, FrameError
from wire.status import NodeStatus
from wire.topics import Topics
from wire.transport import WILL_DELAY_S, Connect, LastWill, Message, Transport

log = logging.getLogger(__name__)

HEARTBEAT_S = 3.0
"""How often the retained status is renewed: it shows operators the free memory, and a second process with the same id
that this one is alive."""
_CLAIM_S = 0.5
"""How long to wait for another process's status when two nodes start at once."""
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
                self._publish_refusal(transport)
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
            self._refuse_if_taken(transport)
            transport.subscribe(self._topics.work(self._node))
            self._about.since_unix_ms = self._clock.unix_ns() // 1_000_000
            self._announce(transport, confirm=True)
            self._show_at_home(transport)
        except BrokerError:
            transport.close()
            raise
        except DuplicateNodeError:
            self._publish_refusal(transport)
            raise
        return transport

    def _publish_refusal(self, transport: Transport) -> None:
        """Tell the process that has our id. It logs this where operators look, unlike the log of this process."""
        with suppress(BrokerError):
            document = msgspec.structs.replace(self._about.offline("its id is in use"), refused=True)
            topic = self._topics.status(self._node)
            transport.publish_confirmed(topic, status.encode_status(document), retain=False, timeout_s=2.0)
        transport.close()

    def _refuse_if_taken(self, transport: Transport) -> None:
        """Raise DuplicateNodeError if another process with our id is alive: its status is online, and is renewed."""
        clock = self._clock
        deadline = clock.monotonic_s() + _CLAIM_S
        other: NodeStatus | None = None
        while (remaining := deadline - clock.monotonic_s()) > 0:
            message = transport.receive(remaining)
            seen = self._other_status(message) if message else None
            if seen is None or seen.refused:
                continue
            if not seen.online:
                other, deadline = None, clock.monotonic_s() + _CLAIM_S
            elif message and not message.retained:
                raise self._taken(seen)
            elif other is None:
                # Alive, or dead for so short a time that its last will is still to come: the next heartbeat or the
                # will decides.
                other, deadline = seen, clock.monotonic_s() + WILL_DELAY_S + HEARTBEAT_S
                log.info("id '%s' was last used on %s; making sure that it is gone", self._node, _where(seen))

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
        elif other := self._other_status(message):
            if other.refused:
                at = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(self._clock.unix_ns() / 1e9))
                self._about.rival = f"{_where(other)} at {at}"
                log.error("another process on %s tried to use our id '%s'", _where(other), self._node)
            elif other.online:
                self._yield_if_later(other)
        elif message.topic == self._topics.status(self._node) and self._boot_id.encode() in message.payload:
            self._status_came_back = True

    def _check_limits(self) -> None:
        before, self._unfit = self._unfit, self._limits.unfit()
        if self._unfit and not before:
            log.warning("%s: taking no work until that has passed", self._unfit)
        elif before and not self._unfit:
            log.info("taking work again")

    def _yield_if_later(self, other: NodeStatus) -> None:
        """Raise DuplicateNodeError if another process with our id was announced before this one."""
        if (other.since_unix_ms, other.boot_id) < (self._about.since_unix_ms, self._boot_id):
            raise self._taken(other)
        log.error("another process on %s tries to use our id '%s'", _where(other), self._node)

    def _other_status(self, message: Message) -> NodeStatus | None:
        """The status in `message`, if another process with our id published it."""
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


def _where(other: NodeStatus) -> str:
    machine = other.machine
    return f"{machine.host} (process {machine.pid})" if machine else "another host"
