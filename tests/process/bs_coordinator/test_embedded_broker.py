"""The embedded broker when a whole fleet connects at once."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from bs_coordinator.broker.processes import open_broker
from tests.waiting import wait_until
from wire.broker_address import BrokerAddress
from wire.topics import Topics
from wire.transport import Transport
from wire.transports import connect

NODES = 8


def test_every_node_that_connects_at_once_is_seen() -> None:
    with open_broker("embedded") as address, ThreadPoolExecutor(NODES) as pool:
        # The more retained messages there are, the longer a connection takes to be set up.
        for round in range(8):
            topics, done = Topics(f"round-{round}"), threading.Event()
            with closing(connect(address, f"watch-{round}")) as watch:
                watch.subscribe(topics.status("+"), qos=1)
                nodes = [pool.submit(_run_node, address, topics, f"n{k}", done) for k in range(NODES)]
                try:
                    _wait_for_nodes(watch, topics)
                finally:
                    done.set()
            for node in nodes:
                node.result()


def _wait_for_nodes(watch: Transport, topics: Topics) -> None:
    seen = set[str]()

    def all_are_seen() -> bool:
        message = watch.receive(0.2)
        if message and (node := topics.node_of_status(message.topic)):
            seen.add(node)
        return len(seen) == NODES

    wait_until(all_are_seen, "the status of every node", poll_s=0)


def _run_node(address: BrokerAddress, topics: Topics, name: str, done: threading.Event) -> None:
    with closing(connect(address, f"{topics.cluster}-{name}")) as transport:
        transport.subscribe(topics.status(name), qos=1)
        transport.receive(0.2)  # as nodes do, to find out whether their name is taken
        transport.subscribe(topics.work(name))
        transport.publish_confirmed(topics.status(name), b"online", retain=True)
        while not done.is_set():
            transport.receive(0.05)
