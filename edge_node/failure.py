"""A node that can't start publishes the reason in its status, where operators look, and not only in its own log."""

import secrets
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

from common.errors import WdmoeError, one_line
from wire import status, transports
from wire.broker_address import BrokerAddress
from wire.errors import BrokerError, FrameError
from wire.status import NodeStatus
from wire.topics import Topics
from wire.transport import Connect

_TIMEOUT_S = 5.0
_LOOK_S = 0.5
_MOST_REASON = 500


@contextmanager
def failure_published(
    address: BrokerAddress, topics: Topics, node: str, *, connect: Connect = transports.connect
) -> Iterator[None]:
    """Publish a `WdmoeError` of the body in the node's retained status, then raise it as it is.

    If the broker can't be reached, only the body's error is raised.
    """
    try:
        yield
    except WdmoeError as error:
        with suppress(BrokerError):
            _publish(address, topics, node, one_line(error)[:_MOST_REASON], connect)
        raise


def _publish(address: BrokerAddress, topics: Topics, node: str, reason: str, connect: Connect) -> None:
    boot_id = secrets.token_hex(8)
    topic = topics.status(node)
    document = NodeStatus(
        schema=status.SCHEMA,
        node=node,
        boot_id=boot_id,
        state="offline",
        since_unix_ms=int(time.time() * 1000),
        reason=f"can't start: {reason}",
    )
    with closing(connect(address, f"wdmoe-{node}-{boot_id}", timeout_s=_TIMEOUT_S)) as transport:
        transport.subscribe(topic, qos=1, timeout_s=_TIMEOUT_S)
        message = transport.receive(_LOOK_S)
        if message and _is_online(message.payload, node):
            return  # another process has this id, so the status is its own
        transport.publish_confirmed(topic, status.encode_status(document), retain=True, timeout_s=_TIMEOUT_S)


def _is_online(payload: bytes, node: str) -> bool:
    try:
        return bool(payload) and status.decode_status(payload, node).online
    except FrameError:
        return False
