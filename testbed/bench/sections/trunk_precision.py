"""One token and eight through trunks of Mixtral-8x7B's size whose weights are bf16, int8 and int4, instant experts.

All arms are in memory at once and measured in turns. Each is compared with reading its weights at the speed of a copy,
of which half the bytes are read and half are written. Without a GPU two of the 32 layers are measured, with the head.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bs_coordinator.config import TrunkDtype, TrunkQuantisation
from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.selection import TopK
from bs_coordinator.trunk.inputs import SequenceInput
from bs_coordinator.trunk.llama import LlamaTrunk
from testbed.bench.instant_experts import InstantExperts
from testbed.bench.random_trunk import LAYERS, SIZE, VOCABULARY, write_random_trunk
from testbed.bench.rows import WARM_UP, Result, Row, Settings, Skipped

_PAST_TOKENS = 512
_CUT_LAYERS = 2
_SEVERAL = 8
_FREE_FOR_FP32 = 20 << 30


class _Format(NamedTuple):
    dtype: TrunkDtype
    quantisation: TrunkQuantisation = "none"

    def __str__(self) -> str:
        return self.dtype if self.quantisation == "none" else f"{self.quantisation} ({self.dtype})"


def measure(settings: Settings) -> Iterator[Result]:
    """Yield a row for each format, with one token and with eight."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers = LAYERS if device == "cuda" else _CUT_LAYERS
    formats = [_Format("bf16"), _Format("bf16", "int8"), _Format("bf16", "int4")]
    if device == "cpu":
        formats = [_Format("fp32"), _Format("bf16"), _Format("fp32", "int8"), _Format("fp32", "int4")]
    elif torch.cuda.mem_get_info()[0] > _FREE_FOR_FP32:
        formats.insert(0, _Format("fp32"))
    arms: list[_Arm] = []
    with tempfile.TemporaryDirectory(prefix="wdmoe-precision-") as folder:
        write_random_trunk(Path(folder), layers=layers, device=device)
        for form in formats:
            try:
                arms.append(_Arm(Path(folder), form, device))
            except torch.OutOfMemoryError:
                yield Skipped(f"the trunk in {form}", "it does not fit into the GPU's memory beside the others")
    for count in (1, _SEVERAL):
        _take_turns(arms, count, settings.samples if device == "cuda" else max(10, settings.samples // 10))
        yield from (arm.row(count, layers) for arm in arms)


class _Arm:
    """A trunk in one format, after some past, and the copy that moves as many bytes as a token reads."""

    def __init__(self, folder: Path, form: _Format, device: str) -> None:
        before = _used(device)
        began = time.perf_counter()
        self._trunk = LlamaTrunk(folder, device=device, dtype=form.dtype, quantisation=form.quantisation)
        self._load_s = time.perf_counter() - began
        self._gpu_bytes = _used(device) - before
        self._form, self._device = form, device
        self._model = DistributedModel(self._trunk, InstantExperts(8, SIZE), TopK(2))
        self._cache = self._trunk.new_cache()
        self._model.step([SequenceInput(list(range(_PAST_TOKENS)), self._cache)])
        self.read_bytes = self._trunk.weight_bytes - VOCABULARY * SIZE * self._trunk.dtype.itemsize
        self._source = torch.empty(self.read_bytes // 2, dtype=torch.uint8, device=device)
        self._target = torch.empty_like(self._source)
        self.ours_ms: list[float] = []
        self.floor_ms: list[float] = []

    def step(self, count: int) -> None:
        """Draft tokens after the past, which stays as it is."""
        self._model.step([SequenceInput(list(range(count)), self._cache, rows=list(range(count)))])
        self._trunk.truncate(self._cache, _PAST_TOKENS)

    def copy(self, _: int) -> None:
        """Read and write, together, as many bytes as a token reads."""
        self._target.copy_(self._source)
        if self._device == "cuda":
            torch.cuda.synchronize()

    def row(self, count: int, layers: int) -> Row:
        """What was measured since the last row."""
        ours, floor = self.ours_ms, self.floor_ms
        self.ours_ms, self.floor_ms = [], []
        where = torch.cuda.get_device_name() if self._device == "cuda" else "CPU"
        what = "one token" if count == 1 else f"{count} tokens"
        cut = "" if layers == LAYERS else f", {layers} of {LAYERS} layers and the head"
        parameters = {
            "device": where, "torch": torch.__version__, "threads": torch.get_num_threads(), "layers": layers,
            "past_tokens": _PAST_TOKENS, "tokens": count, "read_bytes": self.read_bytes,
            "weight_bytes": self._trunk.weight_bytes, "gpu_bytes": self._gpu_bytes, "load_s": round(self._load_s, 2),
            "graphs": self._trunk.graphs([SequenceInput([0] * count, self._cache)]) is not None,
        }  # fmt: skip
        memory = f", {self._gpu_bytes / 1e9:.2f} GB of GPU memory" if self._device == "cuda" else ""
        name = f"{what}, trunk of Mixtral-8x7B's size{cut}, {self._form}{memory}"
        return Row(name, "reading its weights", ours, floor, None, parameters)


def _take_turns(arms: list[_Arm], count: int, samples: int) -> None:
    """Call all arms' steps and copies in an order that is drawn anew each time."""
    calls = [(call, kept) for arm in arms for call, kept in ((arm.step, arm.ours_ms), (arm.copy, arm.floor_ms))]
    rng = np.random.default_rng(0)
    warm_up = min(WARM_UP, samples)
    for turn in range(warm_up + samples):
        for call, kept in (calls[i] for i in rng.permutation(len(calls))):
            began = time.perf_counter_ns()
            call(count)
            if turn >= warm_up:
                kept.append((time.perf_counter_ns() - began) / 1e6)


def _used(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else 0
