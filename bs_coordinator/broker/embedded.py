"""A pure-Python MQTT broker (amqtt) as a child process: `python -m bs_coordinator.broker.embedded ADDRESS PORT`."""

import asyncio
import logging
import signal
import sys
from collections.abc import Iterator
from typing import Any

from amqtt.broker import Broker


class _Subscriptions(dict[str, Any]):
    """Iterates over a copy. amqtt iterates over its subscriptions with an await at each whenever a client connects; a
    client that subscribes meanwhile would end the first one's connection: "dictionary changed size during iteration".
    """

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(super().__iter__()))


async def serve(host: str, port: int) -> None:
    """Serve on host:port until SIGTERM or SIGINT."""
    config = {
        "listeners": {"default": {"type": "tcp", "bind": f"{host}:{port}"}},
        "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
    }
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    broker = Broker(config)
    broker._subscriptions = _Subscriptions()  # amqtt has no public way to replace them
    await broker.start()
    await stop.wait()
    await broker.shutdown()


if __name__ == "__main__":
    # amqtt logs every dropped connection as an error, but only errors that end the broker matter here.
    logging.basicConfig(level=logging.CRITICAL)
    asyncio.run(serve(sys.argv[1], int(sys.argv[2])))
