"""Nodes and a base station in one process, over the in-memory transport: the logits are transformers' own."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from bs_coordinator.base_station import open_base_station
from bs_coordinator.config import BaseStationConfig
from bs_coordinator.trunk.inputs import SequenceInput
from edge_node.agent import NodeAgent
from edge_node.experts.runtime import ExpertRuntime
from edge_node.worker import Worker
from wire.broker_address import BrokerAddress
from wire.experts import parse_selector
from wire.manifest import Scheme, load_manifest
from wire.status import Holding
from wire.tensors import WireDtype
from wire.topics import Topics
from wire.transports.memory import MemoryBroker

_END_S = 60.0


@contextmanager
def _node(bundle: Path, address: BrokerAddress, node: str, selector: str) -> Iterator[Worker]:
    """A node in a thread, with real onnxruntime sessions."""
    manifest = load_manifest(bundle)
    ids = parse_selector(selector, layers=manifest.dims.layers, experts=manifest.dims.experts)
    worker = Worker(ExpertRuntime(bundle, manifest, ids))
    holding = Holding(
        experts=selector,
        model_sha256=manifest.model_sha256,
        dims=manifest.dims,
        quantisation=str(manifest.quantisation),
        resident_bytes=0,
    )
    agent = NodeAgent(
        node=node, topics=Topics("default"), address=address, worker=worker, holding=holding, threads=1, folder=bundle
    )
    stop = threading.Event()
    thread = threading.Thread(target=agent.run, args=(stop,))
    thread.start()
    try:
        yield worker
    finally:
        stop.set()
        thread.join(_END_S)
    assert not thread.is_alive()


def test_a_base_station_and_two_nodes_compute_what_transformers_computes(
    tiny_model: Path, tiny_bundle: Callable[[Scheme], Path]
) -> None:
    bundle = tiny_bundle("fp32")
    ids = torch.randint(0, 1000, (1, 40), generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()(ids).logits[0]
    with (
        MemoryBroker() as broker,
        _node(bundle, broker.address, "a", "L*:E0-3") as a,
        _node(bundle, broker.address, "b", "L*:E4-7") as b,
        open_base_station(BaseStationConfig(bundle=bundle, wire=WireDtype.FP32), broker.address) as station,
    ):
        model = station.model
        (logits,), _ = model.step([SequenceInput(ids[0].tolist(), model.trunk.new_cache())], all_logits=True)
    assert float((logits - expected).norm() / expected.norm()) <= 1e-4
    assert a.counts["answered"] > 2
    assert b.counts["answered"] > 2
