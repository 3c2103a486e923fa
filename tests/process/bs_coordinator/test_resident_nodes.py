"""Local experts beside those of real nodes: tokens stay the same, and what no node holds is computed here."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bs_coordinator.base_station import BaseStation, open_base_station
from bs_coordinator.broker.processes import stop_child
from bs_coordinator.config import BaseStationConfig, ResidentConfig, SamplingConfig
from bs_coordinator.nodes.registry import LOCAL_NODE
from bs_coordinator.resident import read_traffic
from edge_node.experts.memory import largest, needed_bytes
from testbed.local_nodes import LocalNodes
from tests.waiting import wait_until
from wire.experts import ExpertId
from wire.manifest import Scheme, load_manifest
from wire.probe import probe_input

Bundle = Callable[[Scheme], Path]


def _room(bundle: Path, experts: int) -> int:
    manifest = load_manifest(bundle)
    return needed_bytes(largest(manifest.experts, experts), manifest.quantisation.scheme)


def _config(fleet: LocalNodes, resident: ResidentConfig) -> BaseStationConfig:
    return BaseStationConfig(
        bundle=fleet.bundle, cluster=fleet.cluster, resident=resident, degrade=False, draft="none"
    )  # fmt: skip


def _answer(station: BaseStation, tokens: int = 12) -> tuple[list[int], set[str]]:
    """Token ids of a greedy answer, and which nodes computed for it."""
    prompt = station.tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    events = list(station.new_sequence().generate(prompt, SamplingConfig(max_tokens=tokens)))
    records = [d for event in events for step in event.steps for layer in step.layers for d in layer.dispatches]
    assert all(d.down_bytes == d.up_bytes == 0 for d in records if d.node == LOCAL_NODE)
    return [event.id for event in events], {d.node for d in records}


@pytest.mark.parametrize("fleet", ["int4"], indirect=True)
@pytest.mark.slow
def test_tokens_do_not_depend_on_where_experts_are(fleet: LocalNodes, tmp_path: Path) -> None:
    """Over an fp16 wire, with none, some and all experts here; in the end without any node."""
    for k in range(7):
        fleet.start(f"n{k}", f"L*:E{k}")
    fleet.start("n7", "L1:E7")
    fleet.start("leaves", "L0:E7")
    resident = ResidentConfig(_room(fleet.bundle, 16), traffic=tmp_path / "traffic.json")
    with open_base_station(_config(fleet, resident), fleet.address) as station:
        every = station.dispatcher.registry.local_experts
        assert len(every) == 16
        # A base station that holds all experts does not wait for nodes.

        def online(nodes: int) -> Callable[[], bool]:
            def counted() -> bool:
                station.dispatcher.pump(0.1)
                return len(station.dispatcher.registry.nodes) == nodes

            return counted

        wait_until(online(9), "all nodes", poll_s=0)
        hold_locally = station.dispatcher.registry.hold_locally
        hold_locally(frozenset())
        ids, nodes = _answer(station)
        assert LOCAL_NODE not in nodes
        # Whether a node or the base station is faster depends on the machine: one expert has no node from here on.
        stop_child(fleet.processes["leaves"])
        wait_until(online(8), "the node to leave", poll_s=0)
        for some in ({ExpertId(0, e) for e in range(8)}, {i for i in every if i.expert % 2}, {ExpertId(0, 7)}):
            hold_locally(frozenset(some))
            again, nodes = _answer(station)
            assert again == ids
            assert LOCAL_NODE in nodes
            assert len(nodes) > 1
        hold_locally(every)
        fleet.stop()
        assert _answer(station) == (ids, {LOCAL_NODE})
    kept = read_traffic(tmp_path / "traffic.json", station.manifest.dims, station.manifest.model_sha256)
    assert kept.pairs[0].diagonal().sum() > 5 * 12 * 2


@pytest.mark.parametrize("fleet", ["int4"], indirect=True)
def test_the_base_station_keeps_what_no_node_holds_and_takes_over(fleet: LocalNodes) -> None:
    fleet.start("a", "L*:E0-5")
    fleet.start("b", "L*:E0-3")
    with open_base_station(_config(fleet, ResidentConfig(_room(fleet.bundle, 6))), fleet.address) as station:
        here = station.dispatcher.registry.local_experts
        assert {ExpertId(layer, e) for layer in range(2) for e in (6, 7)} <= here
        ids, _ = _answer(station, 8)
        # Both nodes die: their experts are lost; those that the base station holds are computed without asking nodes.
        fleet.stop()
        layer, expert = min(here)
        gate = np.zeros((1, 8), np.float32)
        gate[0, expert] = 1.0
        output = station.dispatcher.apply(layer, probe_input(576), gate)
        assert [d.node for d in output.dispatches] == [LOCAL_NODE]
    assert len(ids) == 8
