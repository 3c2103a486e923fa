"""The distributed model against transformers' own Mixtral: same checkpoint, real broker, real node processes."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM

from bs_coordinator.base_station import BaseStation, open_base_station
from bs_coordinator.broker.processes import open_broker
from bs_coordinator.config import BaseStationConfig, SamplingConfig
from bs_coordinator.engine.sequence import Sequence
from bs_coordinator.engine.speculation import Speculation, load_draft_model
from bs_coordinator.trunk.inputs import SequenceInput
from testbed.demo_assets import demo_bundle, demo_draft, demo_model, export_demo_bundle
from testbed.local_nodes import local_nodes
from wire.broker_address import BrokerAddress
from wire.manifest import Scheme, load_manifest
from wire.tensors import WireDtype

PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why leaves are green.",
    "Write a Python function that returns the larger of two numbers.",
    "Tell me a short story about a lighthouse.",
    "How many minutes are in three hours?",
    "Name four fruits and their colours.",
    "What does an operating system do?",
    "Translate 'good morning' into French.",
)


@contextmanager
def _station(bundle: Path, address: BrokerAddress, folder: Path, wire: WireDtype) -> Iterator[BaseStation]:
    held = load_manifest(bundle).dims.experts
    experts = {f"n{k}": f"L*:E{','.join(map(str, range(k, held, 8)))}" for k in range(8)}
    config = BaseStationConfig(bundle=bundle, wire=wire, degrade=False, draft="none")
    with local_nodes(bundle, address, folder, experts), open_base_station(config, address) as station:
        yield station


def _licence_ids(station: BaseStation, count: int) -> list[int]:
    """Real text of this repository, `count` tokens of it."""
    text = (Path(__file__).parents[3] / "LICENSE").read_text()
    return station.tokenizer.encode(text)[:count]


def _compare(model: Path, station: BaseStation, *, positions: int, prompts: int, tokens: int) -> None:
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = _licence_ids(station, positions)
    assert len(ids) == positions
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0]
    (logits,), _ = station.model.step([SequenceInput(ids, station.model.trunk.new_cache())], all_logits=True)
    error = float((logits - expected).norm() / expected.norm())
    assert error <= 1e-4
    for prompt in PROMPTS[:prompts]:
        chat = station.tokenizer.encode_chat([{"role": "user", "content": prompt}])
        config = SamplingConfig(max_tokens=tokens)
        ours = [event.id for event in station.new_sequence().generate(chat, config)]
        with torch.inference_mode():
            theirs = reference.generate(
                torch.tensor([chat]), attention_mask=torch.ones(1, len(chat), dtype=torch.long),
                max_new_tokens=tokens, do_sample=False,
            )  # fmt: skip
        assert ours == theirs[0, len(chat) :].tolist(), prompt
    del reference
    gc.collect()


def test_two_layers_are_exact(tiny_model: Path, tiny_bundle: Callable[[Scheme], Path], tmp_path: Path) -> None:
    with (
        open_broker("embedded") as embedded,
        _station(tiny_bundle("fp32"), embedded, tmp_path, WireDtype.FP32) as station,
    ):
        _compare(tiny_model, station, positions=300, prompts=3, tokens=24)


@pytest.mark.slow
def test_two_layers_of_the_second_model_are_exact_and_drafts_change_nothing(
    shared_folder: Path, tmp_path: Path
) -> None:
    with FileLock(shared_folder / "tiny-qwen3-moe.lock"):
        model = demo_model(model="qwen3-moe", layers=2)
    export_demo_bundle(model, bundle := tmp_path / "bundle", "fp32")
    with open_broker("embedded") as embedded, _station(bundle, embedded, tmp_path, WireDtype.FP32) as station:
        _compare(model, station, positions=300, prompts=3, tokens=24)
        ids = station.tokenizer.encode_chat([{"role": "user", "content": PROMPTS[0]}])
        config = SamplingConfig(max_tokens=24)
        plain = [event.id for event in station.new_sequence().generate(ids, config)]
        # The dense model that both demo models were made from has their tokens.
        draft = load_draft_model(
            bundle, load_manifest(bundle), station.tokenizer.ids, folder=demo_draft(model="qwen3-moe"), device="cpu"
        )
        drafting = Sequence(station.model, station.tokenizer, speculation=Speculation("dense", draft))
        events = list(drafting.generate(ids, config))
    assert [event.id for event in events] == plain
    assert sum(step.drafted for event in events for step in event.steps) > 0


@pytest.mark.slow
def test_the_demo_model_is_exact(broker: BrokerAddress, tmp_path: Path) -> None:
    with _station(demo_bundle("fp32"), broker, tmp_path, WireDtype.FP32) as station:
        _compare(demo_model(), station, positions=256, prompts=8, tokens=64)


@pytest.mark.slow
def test_a_batch_and_a_reused_cache_change_nothing(
    tiny_bundle: Callable[[Scheme], Path], broker: BrokerAddress, tmp_path: Path
) -> None:
    """Several sequences in one step, and a prompt that continues a cached one, give what each gives alone.

    fp32 sums may group differently, so logits are compared to 1e-5 and tokens exactly.
    """
    with _station(tiny_bundle("fp32"), broker, tmp_path, WireDtype.FP32) as station:
        model, ids = station.model, _licence_ids(station, 60)
        parts = [ids[:10], ids[10:35], ids[35:]]
        together, _ = model.step([SequenceInput(part, model.trunk.new_cache()) for part in parts])
        for part, joint in zip(parts, together, strict=True):
            (alone,), _ = model.step([SequenceInput(part, model.trunk.new_cache())])
            assert float((joint - alone).norm() / alone.norm()) < 1e-5
        config = SamplingConfig(max_tokens=6)
        sequence = station.new_sequence()
        list(sequence.generate(ids[:40], config))
        again = [event.id for event in sequence.generate(ids, config)]
        fresh = [event.id for event in station.new_sequence().generate(ids, config)]
        assert again == fresh


def test_records_add_up(tiny_bundle: Callable[[Scheme], Path], broker: BrokerAddress, tmp_path: Path) -> None:
    with _station(tiny_bundle("int4"), broker, tmp_path, WireDtype.INT8) as station:
        sampled = SamplingConfig(max_tokens=8, temperature=0.8, top_p=0.9, seed=7)
        runs = [list(station.new_sequence().generate(_licence_ids(station, 20), sampled)) for _ in range(2)]
    assert [e.id for e in runs[0]] == [e.id for e in runs[1]]
    for event in runs[0]:
        for step in event.steps:
            split = step.split_ns()
            parts = (split.trunk, split.network, split.compute, split.wait, split.framing)
            assert sum(parts) == step.total_ns
            assert min(parts) >= 0
            assert len(step.layers) == 2
            for layer in step.layers:
                # top-2 over eight nodes with one expert per layer each: two rows of work per token.
                assert sum(d.tokens for d in layer.dispatches) == 2 * step.tokens
                assert all(0 < d.durations.total_ns <= d.round_trip_ns for d in layer.dispatches)
