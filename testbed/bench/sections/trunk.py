"""One token through a trunk of Mixtral-8x7B's size on a GPU, instant experts, compared with reading its weights."""

import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.selection import TopK
from bs_coordinator.trunk.inputs import SequenceInput
from bs_coordinator.trunk.llama import LlamaTrunk
from testbed.bench.instant_experts import InstantExperts
from testbed.bench.random_trunk import SIZE, write_random_trunk
from testbed.bench.rows import Result, Row, Settings, Skipped, in_turns

_PAST_TOKENS = 512
_PROFILED = 5


def measure(settings: Settings) -> Iterator[Result]:
    """Yield rows of decode steps in bf16, with captured CUDA graphs and in eager mode."""
    name = "one token through a trunk of Mixtral-8x7B's size, GPU, bf16"
    if not torch.cuda.is_available():
        yield Skipped(name, "torch sees no CUDA GPU")
        return
    with tempfile.TemporaryDirectory(prefix="wdmoe-trunk-") as folder:
        read_bytes = write_random_trunk(Path(folder))
        for graphs in (True, False):
            trunk = LlamaTrunk(Path(folder), device="cuda", dtype="bf16", graphs=graphs)
            yield _row(f"{name}, {'graphs' if graphs else 'eager'}", trunk, read_bytes, settings)
            del trunk
            torch.cuda.empty_cache()


def _row(name: str, trunk: LlamaTrunk, read_bytes: int, settings: Settings) -> Row:
    model = DistributedModel(trunk, InstantExperts(8, SIZE), TopK(2))
    cache = trunk.new_cache()
    model.step([SequenceInput(list(range(_PAST_TOKENS)), cache)])
    # A copy reads and writes each byte, so copying half the bytes moves as many.
    source = torch.empty(read_bytes // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def step() -> None:
        model.step([SequenceInput([7], cache)])

    def copy() -> None:
        target.copy_(source)
        torch.cuda.synchronize()

    ours, floor = in_turns(step, copy, max(50, settings.samples))
    gpu = torch.cuda.get_device_name()
    parameters = {"gpu": gpu, "past_tokens": _PAST_TOKENS, "weight_bytes": read_bytes, "torch": torch.__version__}
    return Row(name, "reading its weights", ours, floor, 2.0, parameters, _parts(trunk, cache, step, ours))


def _parts(trunk: LlamaTrunk, cache: Any, step: Callable[[], None], ours: list[float]) -> dict[str, float]:
    """Time of the parts of a step in ms: from profiled steps, steps without policy, and graphs run without waiting."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(_PROFILED):
            step()
        torch.cuda.synchronize()
    events = profile.key_averages()
    copies = sum(e.self_device_time_total for e in events if "Mem" in e.key) / _PROFILED / 1000
    whole = statistics.median(ours)
    decoder = trunk.graphs([SequenceInput([7], cache)])
    if decoder is None:
        kernels = sum(e.self_device_time_total for e in events) / _PROFILED / 1000 - copies
        return {"kernels": kernels, "copies": copies, "launches, waiting and Python": whole - kernels - copies}

    zeros = np.zeros((1, SIZE), np.float32)

    def gpu_alone() -> None:
        # Kernels overlap, so their times don't add up; an abandoned graph runs to its end without waiting for experts.
        decoder.begin([[7]], [cache])
        decoder.abandon()

    def loop() -> None:
        decoder.begin([[7]], [cache])
        for layer in range(trunk.layers):
            decoder.attend(layer)
            decoder.add(layer, zeros)
        decoder.head()

    loop_ms, gpu_ms = (statistics.median(times) for times in in_turns(loop, gpu_alone, 50))
    return {
        "kernels": gpu_ms - copies, "copies": copies, "waiting for each other": loop_ms - gpu_ms,
        "choosing and recording": whole - loop_ms,
    }  # fmt: skip
