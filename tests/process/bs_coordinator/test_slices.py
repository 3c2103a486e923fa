"""The demo model's experts in slices, on node processes: the same tokens, also after a kill, or flagged tokens."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bs_coordinator.base_station import open_base_station
from bs_coordinator.config import BaseStationConfig, SamplingConfig
from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.engine.sequence import Sequence, TokenEvent
from bs_coordinator.engine.tokenizer import Tokenizer
from bs_coordinator.selection import TopK
from bs_coordinator.trunk.load import load_trunk
from exporter.bundle.bundle import export_bundle
from testbed.evaluation.local_experts import LocalExperts
from testbed.local_nodes import LocalNodes
from tests.waiting import PATIENCE_S
from wire.broker_address import BrokerAddress
from wire.manifest import Quantisation, Scheme
from wire.tensors import WireDtype

PROMPTS = ["Why does ice float?", "Name three rivers in Europe.", "def add(a, b):"]
SAMPLING = SamplingConfig(max_tokens=12)
SLICES = 4


@pytest.fixture
def bundle(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("exporter.bundle.bundle.try_trunk", lambda *_: [])  # the whole bundle's was tried
    export_bundle(tiny_model, tmp_path / "bundle", Quantisation(scheme="fp32"), jobs=1, slices=SLICES)
    return tmp_path / "bundle"


@pytest.fixture
def nodes(bundle: Path, broker: BrokerAddress, tmp_path: Path) -> Iterator[LocalNodes]:
    nodes = LocalNodes(bundle, broker, tmp_path / "nodes", cluster="slices")
    yield nodes
    nodes.stop()


def _greedy(model: DistributedModel, tokenizer: Tokenizer, prompts: list[str] = PROMPTS) -> list[list[TokenEvent]]:
    return [list(Sequence(model, tokenizer).generate(tokenizer.encode(text), SAMPLING)) for text in prompts]


def _ids(answers: list[list[TokenEvent]]) -> list[list[int]]:
    return [[event.id for event in events] for events in answers]


def test_slices_on_nodes_give_the_same_tokens_and_a_killed_one_is_replaced_or_told(
    nodes: LocalNodes, tiny_bundle: Callable[[Scheme], Path]
) -> None:
    whole = tiny_bundle("fp32")
    local = DistributedModel(load_trunk(whole / "trunk"), LocalExperts(whole, threads=1), TopK(2))
    expected = _ids(_greedy(local, Tokenizer(whole / "trunk")))
    del local
    for k in range(SLICES):
        nodes.start(f"n{k}", f"L*:E*/{k}")
    nodes.start("spare", "L*:E*/0")
    config = BaseStationConfig(
        bundle=nodes.bundle, wire=WireDtype.FP32, cluster=nodes.cluster, degrade=False,
        nodes_timeout_s=PATIENCE_S, layer_timeout_s=PATIENCE_S,
    )  # fmt: skip
    with open_base_station(config, nodes.address) as station:
        assert _ids(_greedy(station.model, station.tokenizer)) == expected
        nodes.processes["n0"].kill()
        replaced = _greedy(station.model, station.tokenizer)
    with open_base_station(replace(config, degrade=True), nodes.address) as station:
        nodes.processes["spare"].kill()
        nodes.processes["spare"].wait(PATIENCE_S)
        degraded = _greedy(station.model, station.tokenizer, PROMPTS[:1])
    assert _ids(replaced) == expected
    assert all(events[-1].stop for events in degraded)
    assert all(step.degraded for events in degraded for event in events for step in event.steps)
