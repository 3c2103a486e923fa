"""Nodes in threads of the process of a test, for the in-memory transport."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_node.agent import NodeAgent
from edge_node.experts.runtime import ExpertRuntime
from edge_node.node_status import StatusSource
from edge_node.worker import Worker
from wire.broker_address import BrokerAddress
from wire.experts import parse_selector
from wire.manifest import load_manifest
from wire.status import Holding
from wire.topics import Topics

_END_S = 60.0


@contextmanager
def node_thread(bundle: Path, address: BrokerAddress, node: str, selector: str) -> Iterator[Worker]:
    """A node in a thread of this process, with real onnxruntime sessions.

    Args:
        bundle: that holds its experts.
        address: of a broker of `wire.transports.memory`.
        node: its name.
        selector: of its experts.

    Yields:
        What answers its requests.
    """
    manifest = load_manifest(bundle)
    dims = manifest.dims
    ids = parse_selector(selector, layers=dims.layers, experts=dims.experts, slices=dims.slices)
    worker = Worker(ExpertRuntime(bundle, manifest, ids))
    holding = Holding(
        experts=selector,
        model_sha256=manifest.model_sha256,
        dims=manifest.dims,
        quantisation=str(manifest.quantisation),
        resident_bytes=0,
    )
    about = StatusSource(node, worker, holding, threads=1, folder=bundle)
    agent = NodeAgent(about=about, topics=Topics("default"), address=address, worker=worker)
    stop = threading.Event()
    thread = threading.Thread(target=agent.run, args=(stop,))
    thread.start()
    try:
        yield worker
    finally:
        stop.set()
        thread.join(_END_S)
    assert not thread.is_alive()
