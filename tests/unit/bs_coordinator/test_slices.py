"""Experts in slices: what a bundle of slices computes, and what happens when holders of slices leave."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from bs_coordinator.base_station import BaseStation, open_base_station
from bs_coordinator.config import BaseStationConfig, SamplingConfig
from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.engine.sequence import Sequence
from bs_coordinator.engine.tokenizer import Tokenizer
from bs_coordinator.selection import TopK
from bs_coordinator.trunk.inputs import SequenceInput
from bs_coordinator.trunk.load import load_trunk
from exporter.bundle.bundle import export_bundle
from testbed.evaluation.local_experts import LocalExperts
from tests.checkpoints import EXPERTS, LAYERS, VOCABULARY, save_mixtral
from tests.node_threads import node_thread
from tests.waiting import wait_until
from wire.experts import ExpertId
from wire.manifest import Quantisation
from wire.tensors import Array, WireDtype
from wire.transports.memory import MemoryBroker

FP32, INT4 = Quantisation(scheme="fp32"), Quantisation(scheme="int4", block=32)
PROMPTS = np.random.default_rng(3).integers(1, VOCABULARY, (4, 12)).tolist()


class _Bundles:
    """Bundles of one random model, made when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        save_mixtral(folder / "checkpoint", "float32", positions=256)

    def get(self, quantisation: Quantisation, slices: int) -> Path:
        out = self._folder / f"{quantisation.scheme}-{slices}"
        if not out.exists():
            export_bundle(self._folder / "checkpoint", out, quantisation, jobs=1, slices=slices)
        return out


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Bundles]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("exporter.bundle.bundle.try_trunk", lambda *_: [])  # it starts a process, and is the same for all
        yield _Bundles(tmp_path_factory.mktemp("slices"))


def _logits(bundle: Path, prompt: list[int]) -> Array:
    model = _local(bundle)
    (logits,), _ = model.step([SequenceInput(prompt, model.trunk.new_cache())], all_logits=True)
    return np.asarray(logits)


def _local(bundle: Path) -> DistributedModel:
    return DistributedModel(load_trunk(bundle / "trunk"), LocalExperts(bundle, threads=1), TopK(2))


def _greedy(model: DistributedModel, bundle: Path, tokens: int = 16) -> list[list[int]]:
    tokenizer, config = Tokenizer(bundle / "trunk"), SamplingConfig(max_tokens=tokens)
    return [[event.id for event in Sequence(model, tokenizer).generate(prompt, config)] for prompt in PROMPTS]


@pytest.mark.parametrize("slices", [2, 3])
def test_slices_compute_what_whole_experts_compute(bundles: _Bundles, slices: int) -> None:
    whole, cut = bundles.get(FP32, 1), bundles.get(FP32, slices)
    assert _greedy(_local(cut), cut) == _greedy(_local(whole), whole)
    for prompt in PROMPTS:
        expected, found = (_logits(bundles.get(INT4, n), prompt) for n in (1, slices))
        assert np.linalg.norm(found - expected) <= 1e-3 * np.linalg.norm(expected)


@contextmanager
def _station(bundle: Path, *, degrade: bool = False, **selectors: str) -> Iterator[tuple[BaseStation, ExitStack]]:
    """A base station with nodes that end with the stack `leave`, those named `stays…` excepted."""
    config = BaseStationConfig(bundle=bundle, wire=WireDtype.FP32, degrade=degrade)
    with MemoryBroker() as broker, ExitStack() as stay, ExitStack() as leave:
        for name, selector in selectors.items():
            stack = stay if name.startswith("stays") else leave
            stack.enter_context(node_thread(bundle, broker.address, name, selector))
        yield stay.enter_context(open_base_station(config, broker.address)), leave


def _step(station: BaseStation, prompt: list[int]) -> tuple[Array, frozenset[int], set[int]]:
    """Logits, degraded tokens and the experts asked."""
    model = station.model
    (logits,), record = model.step([SequenceInput(prompt, model.trunk.new_cache())], all_logits=True)
    asked = {expert for layer in record.layers for d in layer.dispatches for expert in d.experts}
    return np.asarray(logits), record.degraded, asked


def test_another_holder_of_a_slice_takes_over(bundles: _Bundles) -> None:
    bundle = bundles.get(FP32, 2)
    expected = _greedy(_local(bundle), bundle, tokens=8)
    nodes = {"leaves": "L*:E*/0", "stays1": "L*:E*/1", "stays2": "L*:E*/0"}
    with _station(bundle, **nodes) as (station, leave):
        assert _greedy(station.model, bundle, tokens=8) == expected
        leave.close()
        assert _greedy(station.model, bundle, tokens=8) == expected
        _, degraded, asked = _step(station, PROMPTS[0])
    assert not degraded
    assert asked == set(range(EXPERTS))


def test_an_expert_that_lacks_a_slice_is_lost_and_its_tokens_are_flagged(bundles: _Bundles) -> None:
    bundle = bundles.get(FP32, 2)
    nodes = {"leaves": "L*:E0/0", "stays1": "L*:E0/1 L*:E1-3/0", "stays2": "L*:E1-3/1"}
    with _station(bundle, degrade=True, **nodes) as (station, leave):
        expected, degraded, asked = _step(station, PROMPTS[0])
        assert (degraded, asked) == (frozenset(), set(range(EXPERTS)))
        leave.close()
        dispatcher = station.dispatcher
        wait_until(lambda: dispatcher.pump(0.01) or "leaves" not in dispatcher.registry.nodes)
        assert "L0-1:E0/0" in dispatcher.describe_lost()
        found, degraded, asked = _step(station, PROMPTS[0])
    assert asked == {1, 2, 3}
    assert 0 < len(degraded) <= len(PROMPTS[0])
    first = min(degraded)
    np.testing.assert_allclose(found[:first], expected[:first], rtol=1e-4, atol=1e-5)
    assert np.isfinite(found).all()


def test_without_one_slice_of_every_expert_the_others_answer_and_all_tokens_are_flagged(bundles: _Bundles) -> None:
    bundle = bundles.get(FP32, 3)
    nodes = {"leaves": "L*:E*/0", "stays1": "L*:E*/1", "stays2": "L*:E*/2"}
    with _station(bundle, degrade=True, **nodes) as (station, leave):
        assert _step(station, PROMPTS[0])[1] == frozenset()
        leave.close()
        found, degraded, _ = _step(station, PROMPTS[0])
        gate = np.zeros((1, EXPERTS), np.float32)
        gate[0, 2] = 1.0
        x = np.random.default_rng(0).standard_normal((1, 64)).astype(np.float32)
        left = station.dispatcher.forecast(0).left
        assert left is not None
        assert left.tolist() == [[False, True, True]] * EXPERTS
    assert degraded == frozenset(range(len(PROMPTS[0])))
    assert np.isfinite(found).all()
    del x, gate
