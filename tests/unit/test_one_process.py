"""Nodes and a base station in one process, over the in-memory transport: the logits are transformers' own."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from bs_coordinator.base_station import open_base_station
from bs_coordinator.config import BaseStationConfig
from bs_coordinator.trunk.inputs import SequenceInput
from tests.node_threads import node_thread
from wire.manifest import Scheme
from wire.tensors import WireDtype
from wire.transports.memory import MemoryBroker


def test_a_base_station_and_two_nodes_compute_what_transformers_computes(
    tiny_model: Path, tiny_bundle: Callable[[Scheme], Path]
) -> None:
    bundle = tiny_bundle("fp32")
    ids = torch.randint(0, 1000, (1, 40), generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()(ids).logits[0]
    with (
        MemoryBroker() as broker,
        node_thread(bundle, broker.address, "a", "L*:E0-3") as a,
        node_thread(bundle, broker.address, "b", "L*:E4-7") as b,
        open_base_station(BaseStationConfig(bundle=bundle, wire=WireDtype.FP32), broker.address) as station,
    ):
        model = station.model
        (logits,), _ = model.step([SequenceInput(ids[0].tolist(), model.trunk.new_cache())], all_logits=True)
    assert float((logits - expected).norm() / expected.norm()) <= 1e-4
    assert a.counts["answered"] > 2
    assert b.counts["answered"] > 2
