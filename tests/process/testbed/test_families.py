"""Every family of models from its checkpoint to answers, against transformers' own model."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from bs_coordinator.base_station import BaseStation, open_base_station
from bs_coordinator.config import BaseStationConfig, SamplingConfig
from bs_coordinator.trunk.inputs import SequenceInput
from exporter.checkpoint.families import FAMILIES
from testbed.local_nodes import LocalNodes
from testbed.proof.models_page import THROUGH_A_BROKER, UNSCORED, UNTRUNCATED
from tests.checkpoints import VOCABULARY, tiny_moe
from tests.conftest import Run
from tests.node_threads import node_thread
from wire.broker_address import BrokerAddress
from wire.tensors import WireDtype
from wire.transports.memory import MemoryBroker

POSITIONS, TOKENS = 64, 32
HOLDERS = {"a": "L*:E0-2", "b": "L*:E3-7"}
IDS = torch.randint(3, VOCABULARY, (POSITIONS,), generator=torch.Generator().manual_seed(11)).tolist()

Made = Callable[[str], tuple[Path, Any]]


@pytest.fixture
def made(tmp_path: Path, run: Run) -> Made:
    """Bundle in fp32 and whole model of a family, random and tiny."""

    def make(family: str) -> tuple[Path, Any]:
        checkpoint, bundle = tmp_path / "checkpoint", tmp_path / "bundle"
        model = tiny_moe(checkpoint, family)
        done = run("exporter", "bundle", checkpoint, bundle, "--quant", "fp32")
        assert done.returncode == 0, done.stderr
        return bundle, model

    return make


def _compare(station: BaseStation, model: Any) -> None:
    """Logits of all positions of a text, and a greedy answer, are the model's own.

    The tolerance is fp32's for a few layers: the experts' products and sums are grouped differently here.
    """
    with torch.inference_mode():
        expected = model(torch.tensor([IDS])).logits[0].float()
        answer = model.generate(
            torch.tensor([IDS[:12]]), attention_mask=torch.ones(1, 12, dtype=torch.long),
            max_new_tokens=TOKENS, do_sample=False,
        )[0, 12:].tolist()  # fmt: skip
    (logits,), _ = station.model.step([SequenceInput(IDS, station.model.trunk.new_cache())], all_logits=True)
    assert float((logits - expected).norm() / expected.norm()) <= 1e-4
    events = station.new_sequence().generate(IDS[:12], SamplingConfig(max_tokens=TOKENS))
    assert [event.id for event in events] == answer


def _config(bundle: Path, **more: Any) -> BaseStationConfig:
    return BaseStationConfig(bundle=bundle, wire=WireDtype.FP32, degrade=False, draft="none", **more)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_the_whole_models(family: str, made: Made) -> None:
    bundle, model = made(family)
    with ExitStack() as stack:
        broker = stack.enter_context(MemoryBroker())
        for node, selector in HOLDERS.items():
            stack.enter_context(node_thread(bundle, broker.address, node, selector))
        station = stack.enter_context(open_base_station(_config(bundle), broker.address))
        _compare(station, model)
        # docs/models.md says so.
        assert station.model.trunk.scored == (family not in UNSCORED)
        assert station.model.trunk.can_truncate == (family not in UNTRUNCATED)


@pytest.mark.parametrize("family", THROUGH_A_BROKER)
def test_answers_through_a_broker_and_node_processes(
    family: str, made: Made, broker: BrokerAddress, tmp_path: Path
) -> None:
    bundle, model = made(family)
    fleet = LocalNodes(bundle, broker, tmp_path / "nodes", cluster=f"family-{family}")
    try:
        for node, selector in HOLDERS.items():
            fleet.start(node, selector)
        with open_base_station(_config(bundle, cluster=fleet.cluster), broker) as station:
            _compare(station, model)
    finally:
        fleet.stop()
