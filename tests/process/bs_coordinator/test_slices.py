"""The demo model's experts in slices, on node processes: the same tokens, also after a kill, or flagged tokens.

`WDMOE_AT_LENGTH=1` compares whole and sliced experts on the whole demo model with eight prompts of 64 tokens, instead
of two layers and a few tokens (some minutes, 3 GB of disk at once); `-s` shows the differences.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bs_coordinator.base_station import open_base_station
from bs_coordinator.config import BaseStationConfig, SamplingConfig
from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.engine.sequence import Sequence, TokenEvent
from bs_coordinator.engine.tokenizer import Tokenizer
from bs_coordinator.selection import TopK
from bs_coordinator.trunk.inputs import SequenceInput
from bs_coordinator.trunk.load import load_trunk
from exporter.bundle.bundle import export_bundle
from testbed.demo_assets import demo_model
from testbed.evaluation.local_experts import LocalExperts
from testbed.local_nodes import LocalNodes
from testbed.prompts import PROMPTS as SHORT_PROMPTS
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


def test_slices_give_the_same_tokens_and_a_lost_one_is_replaced_or_flagged(
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


def _local(checkpoint: Path, folder: Path, scheme: Scheme, slices: int) -> DistributedModel:
    """The model in this process, from a bundle that is removed again."""
    quantisation = Quantisation(scheme=scheme, block=32 if scheme == "int4" else 0)
    export_bundle(checkpoint, folder, quantisation, jobs=2, slices=slices)
    model = DistributedModel(load_trunk(folder / "trunk"), LocalExperts(folder, threads=1), TopK(2))
    shutil.rmtree(folder / "experts")
    return model


@pytest.mark.slow
def test_whole_and_sliced_experts_agree(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy tokens in fp32 are the same; logits in int4, for these tokens, differ by at most a thousandth.

    int4 experts round activations to int8, so that a last bit grows with every layer: over 30 layers, logits differ by
    as much as if a text is computed in two steps instead of one.
    """
    monkeypatch.setattr("exporter.bundle.bundle.try_trunk", lambda *_: [])  # it is the same each time
    at_length = "WDMOE_AT_LENGTH" in os.environ
    checkpoint = demo_model() if at_length else tiny_model
    prompts, tokens = (SHORT_PROMPTS[:8], 64) if at_length else (SHORT_PROMPTS[:2], 8)
    tokenizer = Tokenizer(checkpoint)
    chats = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in prompts]
    greedy: dict[int, list[list[int]]] = {}
    for slices in (1, 2, 4):
        model = _local(checkpoint, tmp_path / f"fp32-{slices}", "fp32", slices)
        greedy[slices] = [
            [event.id for event in Sequence(model, tokenizer).generate(ids, SamplingConfig(max_tokens=tokens))]
            for ids in chats
        ]
        del model
    print(f"fp32: {sum(map(len, greedy[1]))} greedy tokens of {len(prompts)} prompts")
    assert greedy[2] == greedy[1]
    assert greedy[4] == greedy[1]
    texts = [ids + answer for ids, answer in zip(chats, greedy[1], strict=True)]
    logits: dict[int, list[torch.Tensor]] = {}
    in_two_steps: list[torch.Tensor] = []
    for slices in (1, 2, 4):
        model = _local(checkpoint, tmp_path / f"int4-{slices}", "int4", slices)
        logits[slices] = [_logits(model, [ids]) for ids in texts]
        if slices == 1:
            in_two_steps = [_logits(model, [ids[: len(ids) // 2], ids[len(ids) // 2 :]]) for ids in texts]
        del model
    rounding = _furthest(in_two_steps, logits[1])
    for slices in (2, 4):
        worst = _furthest(logits[slices], logits[1])
        print(
            f"int4: {slices} slices, largest relative difference of a text's logits {worst:.1e}, steps {rounding:.1e}"
        )
        assert worst <= (2 * rounding if at_length else 1e-3)


def _logits(model: DistributedModel, parts: list[list[int]]) -> torch.Tensor:
    """Of a text that is computed in one step for each part."""
    cache = model.trunk.new_cache()
    return torch.cat([model.step([SequenceInput(ids, cache)], all_logits=True)[0][0] for ids in parts])


def _furthest(logits: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(logits, others, strict=True))
