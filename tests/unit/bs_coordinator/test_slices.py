"""Experts in slices: what a bundle of slices computes, and what happens when holders of slices leave."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from bs_coordinator.base_station import BaseStation, open_base_station
from bs_coordinator.config import BaseStationConfig, SamplingConfig
from bs_coordinator.engine.experts import ExpertOutput, Ready
from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.engine.sequence import Sequence
from bs_coordinator.engine.tokenizer import Tokenizer
from bs_coordinator.errors import ExpertsLostError, PlacementError
from bs_coordinator.selection import TopK
from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.trunk.inputs import SequenceInput
from bs_coordinator.trunk.load import load_trunk
from edge_node.experts.runtime import ExpertRuntime
from exporter.bundle.bundle import export_bundle
from testbed.evaluation.local_experts import LocalExperts
from tests.checkpoints import EXPERTS, VOCABULARY, save_mixtral
from tests.node_threads import node_thread
from tests.waiting import PATIENCE_S
from wire.experts import UnitId
from wire.manifest import Quantisation, load_manifest
from wire.tensors import Array, WireDtype
from wire.transports.memory import MemoryBroker

FP32, INT4 = Quantisation(scheme="fp32"), Quantisation(scheme="int4", block=32)
PROMPTS = np.random.default_rng(3).integers(1, VOCABULARY, (3, 12)).tolist()


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


def _local(bundle: Path) -> DistributedModel:
    return DistributedModel(load_trunk(bundle / "trunk"), LocalExperts(bundle, threads=1), TopK(2))


def _logits(model: DistributedModel, prompt: list[int]) -> Array:
    (logits,), _ = model.step([SequenceInput(prompt, model.trunk.new_cache())], all_logits=True)
    return np.asarray(logits)


def _greedy(model: DistributedModel, bundle: Path, tokens: int = 8) -> list[list[int]]:
    tokenizer, config = Tokenizer(bundle / "trunk"), SamplingConfig(max_tokens=tokens)
    return [[event.id for event in Sequence(model, tokenizer).generate(prompt, config)] for prompt in PROMPTS]


@pytest.mark.parametrize("slices", [2, 3])
def test_slices_compute_what_whole_experts_compute(bundles: _Bundles, slices: int) -> None:
    whole, cut = bundles.get(FP32, 1), bundles.get(FP32, slices)
    assert _greedy(_local(cut), cut) == _greedy(_local(whole), whole)
    models = [_local(bundles.get(INT4, n)) for n in (1, slices)]
    for prompt in PROMPTS:
        expected, found = (_logits(model, prompt) for model in models)
        assert np.linalg.norm(found - expected) <= 1e-3 * np.linalg.norm(expected)


class _LeftExperts:
    """Experts of three slices that lack the first."""

    def __init__(self, bundle: Path) -> None:
        self._runtime = ExpertRuntime(bundle, manifest := load_manifest(bundle), [e.id for e in manifest.experts])

    def begin(self, layer: int, hidden: Array, gate: Array) -> Ready:
        output = np.zeros(hidden.shape, np.float32)
        for expert in np.flatnonzero(gate.any(axis=0)).tolist():
            for slice_ in (1, 2):
                output += self._runtime.run(UnitId(layer, 3 * expert + slice_), hidden) * gate[:, expert, None]
        return Ready(ExpertOutput(output))

    def forecast(self, layer: int) -> LayerForecast:
        return LayerForecast.even(layer, EXPERTS)


@contextmanager
def _station(
    bundle: Path, selectors: dict[str, str], *, degrade: bool = False
) -> Iterator[tuple[BaseStation, ExitStack]]:
    """A base station with nodes, by their selectors; those named `leaves` end with the stack."""
    config = BaseStationConfig(bundle=bundle, wire=WireDtype.FP32, degrade=degrade, layer_timeout_s=PATIENCE_S)
    with MemoryBroker() as broker, ExitStack() as stay, ExitStack() as leave:
        for name, selector in selectors.items():
            stack = leave if name == "leaves" else stay
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
    expected = _greedy(_local(bundle), bundle)
    nodes = {"leaves": "L*:E*/0", "stays1": "L*:E*/1", "stays2": "L*:E*/0"}
    with _station(bundle, nodes) as (station, leave):
        assert _greedy(station.model, bundle) == expected
        leave.close()
        assert _greedy(station.model, bundle) == expected
        _, degraded, asked = _step(station, PROMPTS[0])
    assert not degraded
    assert asked == set(range(EXPERTS))


def test_an_expert_that_lacks_a_slice_is_lost_and_its_tokens_are_flagged(bundles: _Bundles) -> None:
    bundle = bundles.get(FP32, 2)
    nodes = {"leaves": "L*:E0/0", "stays1": "L*:E0/1 L*:E1-3/0", "stays2": "L*:E1-3/1"}
    with _station(bundle, nodes, degrade=True) as (station, leave):
        expected, degraded, asked = _step(station, PROMPTS[0])
        assert (degraded, asked) == (frozenset(), set(range(EXPERTS)))
        leave.close()
        found, degraded, asked = _step(station, PROMPTS[0])
        assert station.dispatcher.describe_lost().startswith("no node holds L0-1:E0/0 (online: stays1, stays2)")
    assert asked == {1, 2, 3}
    assert 0 < len(degraded) <= len(PROMPTS[0])
    first = min(degraded)
    np.testing.assert_allclose(found[:first], expected[:first], rtol=1e-4, atol=1e-5)
    assert np.isfinite(found).all()


def test_without_one_slice_of_every_expert_the_others_answer_and_all_tokens_are_flagged(bundles: _Bundles) -> None:
    bundle = bundles.get(FP32, 3)
    nodes = {"leaves": "L*:E*/0", "stays1": "L*:E*/1", "stays2": "L*:E*/2"}
    with _station(bundle, nodes, degrade=True) as (station, leave):
        assert _step(station, PROMPTS[0])[1] == frozenset()
        leave.close()
        found, degraded, _ = _step(station, PROMPTS[0])
    assert degraded == frozenset(range(len(PROMPTS[0])))
    expected = _logits(DistributedModel(load_trunk(bundle / "trunk"), _LeftExperts(bundle), TopK(2)), PROMPTS[0])
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)


def test_without_degrade_a_lost_slice_ends_the_answer(bundles: _Bundles) -> None:
    bundle = bundles.get(FP32, 2)
    with _station(bundle, {"leaves": "L*:E*/0", "stays1": "L*:E*/1"}) as (station, leave):
        leave.close()
        with pytest.raises((ExpertsLostError, PlacementError)):
            _step(station, PROMPTS[0])
