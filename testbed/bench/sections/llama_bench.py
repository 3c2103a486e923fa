"""Tokens per second as llama.cpp's llama-bench measures and writes them: `pp512` and `tg128`, mean ± deviation.

Source: llama.cpp, tools/llama-bench. `pp512` computes a prompt of 512 random tokens, `tg128` decodes 128 random tokens
from an empty cache, one by one; nothing is sampled, and there are no drafts.
"""

import time
from collections.abc import Iterator

import numpy as np

from bs_coordinator.base_station import open_base_station
from bs_coordinator.broker.processes import open_broker
from bs_coordinator.config import BaseStationConfig
from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.engine.sequence import PREFILL_CHUNK_TOKENS
from bs_coordinator.trunk.inputs import SequenceInput
from testbed.bench.rows import Result, Settings, Throughput
from testbed.bench.sections.decode import NODES
from testbed.demo_assets import demo_bundle
from testbed.local_nodes import local_nodes
from wire.manifest import load_manifest

REPETITIONS = 5
"""As llama-bench's `-r`; one more before them is not counted."""
_TESTS = {"pp512": (512, PREFILL_CHUNK_TOKENS), "tg128": (128, 1)}
"""Tokens of each test, and how many of them go through the model in one step."""


def measure(settings: Settings) -> Iterator[Result]:
    """Yield a row per test: the demo model in int4, eight nodes and the broker on this machine."""
    bundle = demo_bundle("int4", console=settings.console)
    manifest = load_manifest(bundle)
    parameters = {
        "bundle": bundle.name, "nodes": len(NODES), "threads_per_node": 1, "broker": settings.broker,
        "expert_bytes": sum(entry.bytes for entry in manifest.experts),
    }  # fmt: skip
    with (
        open_broker(settings.broker) as address,
        local_nodes(bundle, address, settings.folder / "nodes", NODES),
        open_base_station(BaseStationConfig(bundle=bundle, degrade=False, draft="none"), address) as station,
    ):
        rng = np.random.default_rng(0)
        for name, (tokens, per_step) in _TESTS.items():
            ids = rng.integers(station.tokenizer.size, size=tokens).tolist()
            _, *seconds = (run(station.model, ids, per_step=per_step) for _ in range(1 + REPETITIONS))
            rates = [tokens / s for s in seconds]
            yield Throughput(name, rates, {**parameters, "tokens": tokens, "tokens_per_step": per_step})


def run(model: DistributedModel, ids: list[int], *, per_step: int) -> float:
    """Take tokens through the model, `per_step` at a time, from an empty cache; returns the seconds."""
    cache = model.trunk.new_cache()
    began = time.perf_counter()
    for start in range(0, len(ids), per_step):
        model.step([SequenceInput(ids[start : start + per_step], cache)])
    return time.perf_counter() - began
