"""Keeps a node's id to one process.

Two processes with the same id would answer each other's requests and hide each other's death. A node therefore looks
for its own id before it announces itself, and keeps looking: of two processes, the one that was announced first stays.
"""

import logging
import time
from collections import Counter
from contextlib import suppress

import msgspec

from common.clock import Clock
from edge_node.errors import DuplicateNodeError
from edge_node.node_status import HEARTBEAT_S, StatusSource
from wire import status
from wire.errors import BrokerError, FrameError
from wire.status import NodeStatus
from wire.transport import WILL_DELAY_S, Message, Transport

log = logging.getLogger(__name__)

_CLAIM_S = 0.5
"""How long to wait for another process's status when two nodes start at once."""


class NodeId:
    """The id of this process's node, which other processes may want too."""

    def __init__(self, about: StatusSource, topic: str, boot_id: str, dropped: Counter[str], *, clock: Clock) -> None:
        """Nothing was received so far.

        Args:
            about: makes the node's statuses; told of processes that tried to use its id.
            topic: of the node's statuses.
            boot_id: of this process.
            dropped: where messages that are no statuses are counted, by reason.
            clock: for waiting.
        """
        self._about = about
        self._topic = topic
        self._boot_id = boot_id
        self._dropped = dropped
        self._clock = clock

    def claim(self, transport: Transport) -> None:
        """Wait until it is known that no other process has the id: its status would be online, and renewed.

        Raises:
            DuplicateNodeError: another live process has the id.
        """
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
                log.info("id '%s' was last used on %s; making sure that it is gone", self._about.node, _where(seen))

    def watch(self, message: Message) -> bool:
        """Take note of another process's status; False if the message is none.

        Raises:
            DuplicateNodeError: another process with the id was announced before this one.
        """
        other = self._other_status(message)
        if other is None:
            return False
        node = self._about.node
        if other.refused:
            at = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(self._clock.unix_ns() / 1e9))
            self._about.rival = f"{_where(other)} at {at}"
            log.error("another process on %s tried to use our id '%s'", _where(other), node)
        elif other.online:
            if (other.since_unix_ms, other.boot_id) < (self._about.since_unix_ms, self._boot_id):
                raise self._taken(other)
            log.error("another process on %s tries to use our id '%s'", _where(other), node)
        return True

    def report_refusal(self, transport: Transport) -> None:
        """Tell the process that has the id. It logs this where operators look, unlike the log of this process."""
        document = msgspec.structs.replace(self._about.offline("its id is in use"), refused=True)
        with suppress(BrokerError):
            transport.publish_confirmed(self._topic, status.encode_status(document), retain=False, timeout_s=2.0)

    def _other_status(self, message: Message) -> NodeStatus | None:
        """The status in `message`, if another process with this id published it."""
        if message.topic != self._topic or not message.payload:
            return None
        try:
            seen = status.decode_status(message.payload, self._about.node)
        except FrameError as error:
            self._dropped[f"dropped:{error.reason}"] += 1
            return None
        return seen if seen.boot_id != self._boot_id else None

    def _taken(self, other: NodeStatus) -> DuplicateNodeError:
        return DuplicateNodeError(
            f"node id '{self._about.node}' is in use on {_where(other)}: choose another --id or stop that one"
        )


def _where(other: NodeStatus) -> str:
    machine = other.machine
    return f"{machine.host} (process {machine.pid})" if machine else "another host"
