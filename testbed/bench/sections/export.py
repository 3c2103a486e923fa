"""The export of a checkpoint, compared with the slower of its parts alone: the disk, and the quantiser.

In each turn, in changing order: as many bytes are read and written as the export reads and writes; as many experts are
quantised, from RAM; the checkpoint is exported. The checkpoint is dropped from the page cache before it is read.
"""

import itertools
import multiprocessing
import os
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

from common.parent_death import end_with_parent
from common.sizes import readable_bytes
from exporter.bundle.bundle import export_bundle
from exporter.checkpoint.checkpoint import Checkpoint, open_checkpoint
from exporter.config import ExportConfig
from testbed.bench.export_parts import Quantiser, copies, copy_all, forget_cached, open_quantiser
from testbed.bench.rows import Row, Settings
from testbed.process_memory import memory_bytes
from testbed.twin.shapes import CONFIGS
from testbed.twin.write import write_checkpoint
from wire.manifest import Quantisation

TARGET = 1.43
"""Target ratio: the export reaches 0.70 of the slower part's speed."""
SMALL: dict[str, Any] = {
    **CONFIGS["mixtral-8x7b"],
    "num_hidden_layers": 1,
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "vocab_size": 8192,
}
"""The checkpoint's config if none is given: one layer of half of Mixtral's width."""
_INT4 = Quantisation(scheme="int4", block=32)
_LOOK_S = 0.25
"""Time between two looks at the memory."""


class _Export(NamedTuple):
    """Times in s of one export: until tokenizer and chat template are tried, from then on until the last expert, and
    after that; and its most memory."""

    before_s: float
    copied_s: float
    after_s: float
    memory_bytes: int

    @property
    def all_s(self) -> float:
        return self.before_s + self.copied_s + self.after_s


def measure(settings: Settings) -> Iterator[Row]:
    """Yield a row for the export as a whole, and one for trunk and experts."""
    settings.folder.mkdir(parents=True, exist_ok=True)
    # Not in /tmp, which may be RAM.
    with tempfile.TemporaryDirectory(prefix=".export-", dir=settings.folder) as scratch:
        checkpoint = settings.checkpoint or Path(scratch) / "checkpoint"
        if settings.checkpoint is None:
            with settings.console.status("a checkpoint of random weights"):
                write_checkpoint(checkpoint, SMALL, seed=0, progress=lambda _done, _all: None)
        source, jobs = open_checkpoint(checkpoint), ExportConfig().jobs
        with open_quantiser(source.dims, _INT4, jobs) as quantiser:
            yield from _rows(settings, source, quantiser, jobs, Path(scratch) / "out")


def _rows(settings: Settings, source: Checkpoint, quantiser: Quantiser, jobs: int, out: Path) -> Iterator[Row]:
    trunk, experts = copies(source, _INT4)
    files = {tensor.file for copy in (trunk, *experts) for tensor in copy.tensors}
    disk: list[tuple[float, float]] = []
    quantised: list[float] = []
    exports: list[_Export] = []

    def copy() -> None:
        began_s = time.perf_counter()
        copy_all([trunk], out, 1)
        between_s = time.perf_counter()
        copy_all(experts, out, jobs)
        disk.append((between_s - began_s, time.perf_counter() - between_s))

    arms: tuple[Callable[[], object], ...] = (
        copy,
        lambda: quantised.append(quantiser.run_s(len(experts))),
        lambda: exports.append(_export(source.folder, out, jobs)),
    )
    orders = itertools.cycle(itertools.permutations(arms))
    for turn, order in enumerate(itertools.islice(orders, max(2, settings.samples // 100)), start=1):
        with settings.console.status(f"turn {turn}: disk, quantiser and export"):
            for arm in order:
                forget_cached(files)
                arm()
                shutil.rmtree(out, ignore_errors=True)
    expert_bytes = sum(copy.read_bytes for copy in experts)
    parameters = {
        "checkpoint": source.source.name,
        "processes": jobs,
        "read_bytes": trunk.read_bytes + expert_bytes,
        "written_bytes": trunk.written_bytes + sum(copy.written_bytes for copy in experts),
        "memory_bytes": max(export.memory_bytes for export in exports),
        "parts": "medians",
    }
    size = readable_bytes(trunk.read_bytes + expert_bytes)
    yield Row(
        f"export of {size} to {_INT4}, {jobs} processes", "the slower of disk and quantiser alone",
        [1e3 * export.all_s for export in exports],
        [1e3 * max(sum(copied_s), quantised_s) for copied_s, quantised_s in zip(disk, quantised, strict=True)],
        # Starting up takes longer than the experts of the small checkpoint.
        TARGET if settings.checkpoint else None, parameters,
        {
            "disk alone": _median_ms(sum(copied_s) for copied_s in disk),
            "quantiser alone": _median_ms(quantised),
            "start and trials": _median_ms(export.before_s for export in exports),
            "trunk and experts": _median_ms(export.copied_s for export in exports),
            "end": _median_ms(export.after_s for export in exports),
        },
    )  # fmt: skip
    yield Row(
        f"its trunk and experts, {size}", "the slower of disk and quantiser alone",
        [1e3 * export.copied_s for export in exports],
        [1e3 * max(sum(copied_s), quantised_s) for copied_s, quantised_s in zip(disk, quantised, strict=True)],
        TARGET, parameters,
        {"disk alone": _median_ms(sum(copied_s) for copied_s in disk), "quantiser alone": _median_ms(quantised)},
    )  # fmt: skip


def _median_ms(times_s: Iterable[float]) -> float:
    return 1e3 * statistics.median(times_s)


def _export(checkpoint: Path, out: Path, jobs: int) -> _Export:
    """Export in a process of its own, and watch the memory of it and of its children."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=end_with_parent) as pool:
        pid = pool.submit(os.getpid).result()
        began_s = time.monotonic()
        future: Future[tuple[float, float]] = pool.submit(_stamps, checkpoint, out, jobs)
        pss_bytes = 0
        try:
            while wait([future], _LOOK_S).not_done:
                pss_bytes = max(pss_bytes, memory_bytes(pid)[1])
        except BaseException:
            os.kill(pid, signal.SIGTERM)  # the pool would wait for the end of the export
            raise
        first_s, last_s = future.result()
        ended_s = time.monotonic()
    return _Export(first_s - began_s, last_s - first_s, ended_s - last_s, pss_bytes)


def _stamps(checkpoint: Path, out: Path, jobs: int) -> tuple[float, float]:
    """Export; returns the times of the monotonic clock, which all processes share, around the experts."""
    stamps_s: list[float] = []
    export_bundle(checkpoint, out, _INT4, jobs=jobs, progress=lambda _done, _all: stamps_s.append(time.monotonic()))
    return stamps_s[0], stamps_s[-1]
