"""The embedded broker when a whole fleet connects at once."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from bs_coordinator.broker.processes import open_broker
from wire.broker_url import BrokerAddress
from wire.mqtt import MqttTransport
from wire.topics import Topics

NODES = 8


def test_every_node_that_connects_at_once_is_seen() -> None:
    with open_broker("embedded") as address, ThreadPoolExecutor(NODES) as pool:
        # The more retained messages there are, the longer a connection takes to be set up.
        for round in range(8):
            topics, all_seen = Topics(f"round-{round}"), threading.Event()
            with closing(MqttTransport(address, f"watch-{round}")) as watch:
                watch.subscribe(topics.status("+"), qos=1)
                nodes = [pool.submit(_node, address, topics, f"n{k}", all_seen) for k in range(NODES)]
                seen, deadline = set[str](), time.monotonic() + 10
                while len(seen) < NODES and time.monotonic() < deadline:
                    message = watch.receive(0.2)
                    if message and (node := topics.node_of_status(message.topic)):
                        seen.add(node)
            all_seen.set()
            for node_run in nodes:
                node_run.result()
            assert len(seen) == NODES


def _node(address: BrokerAddress, topics: Topics, name: str, stop: threading.Event) -> None:
    with closing(MqttTransport(address, f"{topics.cluster}-{name}")) as transport:
        transport.subscribe(topics.status(name), qos=1)
        claimed = time.monotonic() + 0.2  # as nodes do, to find out whether their name is taken
        while time.monotonic() < claimed:
            transport.receive(0.1)
        transport.subscribe(topics.work(name))
        transport.publish_confirmed(topics.status(name), b"online", retain=True)
        while not stop.is_set():
            transport.receive(0.05)
