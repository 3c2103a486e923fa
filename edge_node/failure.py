"""A node that can't start says why where somebody looks: in its status, not only in a log on its device."""

import secrets
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

from common.errors import WdmoeError
from wire import status
from wire.broker_url import BrokerAddress
from wire.errors import BrokerError, FrameError
from wire.mqtt import MqttTransport
from wire.status import NodeStatus
from wire.topics import Topics

_TIMEOUT_S = 5.0
_LOOK_S = 0.5
_MOST_REASON = 500


@contextmanager
def failure_told(address: BrokerAddress, topics: Topics, node: str) -> Iterator[None]:
    """An error of ours within the body is told to the cluster, and goes on to the user of this device."""
    try:
        yield
    except WdmoeError as error:
        with suppress(BrokerError):
            _tell(address, topics, node, " ".join(str(error).split())[:_MOST_REASON])
        raise


def _tell(address: BrokerAddress, topics: Topics, node: str, reason: str) -> None:
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
    with closing(MqttTransport(address, f"wdmoe-{node}-{boot_id}", timeout_s=_TIMEOUT_S)) as transport:
        transport.subscribe(topic, qos=1, timeout_s=_TIMEOUT_S)
        message = transport.receive(_LOOK_S)
        if message and _online(message.payload, node):
            return  # another process has this id: its status is not ours to change
        transport.publish_confirmed(topic, status.encode_status(document), retain=True, timeout_s=_TIMEOUT_S)


def _online(payload: bytes, node: str) -> bool:
    try:
        return bool(payload) and status.decode_status(payload, node).online
    except FrameError:
        return False
