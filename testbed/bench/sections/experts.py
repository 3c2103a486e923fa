"""One token through experts on one core, compared with reading as many bytes as their files have."""

import json
import multiprocessing
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from edge_node.experts import ExpertRuntime, return_freed_memory
from edge_node.experts.prepacked import prepacked_model
from exporter.expert.expert import ExpertJob, export_expert
from testbed.bench.random_experts import MIXTRAL, manifest_of, random_weights
from testbed.bench.rows import Row, Settings, in_turns
from testbed.demo_assets import demo_bundle
from wire.experts import ExpertId
from wire.manifest import Manifest, Quantisation, Scheme, load_manifest
from wire.onnx_session import expert_options, open_session
from wire.probe import probe_input

TARGET = 1.5
"""Target ratio of the preset for machines with dot-product instructions."""
ID = ExpertId(0, 0)
_PRESET = Quantisation(scheme="int4", block=32)
_BIG = (
    _PRESET,
    Quantisation(scheme="int4", block=64),
    Quantisation(scheme="int4", block=128),
    Quantisation(scheme="int4", block=32, symmetric=True),
    Quantisation(scheme="int8", block=32),
    Quantisation(scheme="int8", block=128),
    Quantisation(scheme="int8-dynamic"),
)
_PROFILED_RUNS = 20


def measure(settings: Settings) -> Iterator[Row]:
    """Yield rows for an expert of Mixtral-8x7B's size, and for the demo model's experts layer by layer."""
    with tempfile.TemporaryDirectory(prefix="wdmoe-bench-") as folder:
        with settings.console.status("experts of 4096 × 14336"):
            weights = random_weights(Path(folder), MIXTRAL)
        for quantisation in _BIG:
            out = Path(folder) / str(quantisation).replace(" ", "-")
            entry = export_expert(ExpertJob(ID, weights, MIXTRAL, quantisation, out))
            manifest = manifest_of([entry], MIXTRAL, quantisation)
            for prepacked in (None, out / "prepacked"):
                yield _big(settings, out, manifest, prepacked)
    schemes: tuple[Scheme, ...] = ("int4", "int8", "fp32")
    for scheme in schemes:
        yield _demo(settings, scheme)


def _big(settings: Settings, bundle: Path, manifest: Manifest, prepacked: Path | None) -> Row:
    runtime = ExpertRuntime(bundle, manifest, [ID], threads=1, prepacked=prepacked)
    x = probe_input(manifest.dims.hidden)
    file_bytes = manifest.experts[0].bytes
    kernel, read = _fastest_reader(file_bytes)
    ours, floor = in_turns(lambda: runtime.run(ID, x), read, max(15, settings.samples // 10), warm_up=3)
    parameters = {
        "quantisation": str(manifest.quantisation),
        "file_bytes": file_bytes,
        "read_by": kernel,
        "floor_gb_per_s": file_bytes / statistics.median(floor) / 1e6,
        "prepacked": prepacked is not None,
        "anonymous_bytes": _loaded_bytes(bundle, manifest, prepacked),
        "parts": "medians by onnxruntime's profiler, in a separate session",
    }
    entry = manifest.experts[0]
    model = prepacked_model(bundle, entry, prepacked) if prepacked else bundle / entry.files[0].path
    parts = _parts_ms(model, x)
    where = "mapped" if prepacked else "in memory"
    name = f"one token, an expert of 4096 × 14336, {manifest.quantisation}, {where}, one core"
    target = TARGET if manifest.quantisation == _PRESET else None
    return Row(name, "reading as many bytes as its file", ours, floor, target, parameters, parts)


def _demo(settings: Settings, scheme: Scheme) -> Row:
    """A row of one token through expert 0 of all layers; each has left the CPU cache when its turn comes."""
    bundle = demo_bundle(scheme, console=settings.console)
    manifest = load_manifest(bundle)
    entries = [entry for entry in manifest.experts if entry.expert == 0]
    runtime = ExpertRuntime(bundle, manifest, [entry.id for entry in entries], threads=1)
    x = probe_input(manifest.dims.hidden)
    readers = [_fastest_reader(entry.bytes)[1] for entry in entries]

    def compute() -> None:
        for id in runtime.ids:
            runtime.run(id, x)

    def read() -> None:
        for reader in readers:
            reader()

    name = f"one token through {len(entries)} experts, {scheme}, one thread"
    ours, floor = in_turns(compute, read, max(10, settings.samples // 10))
    return Row(name, "reading as many bytes", ours, floor, None, {"scheme": scheme, "bundle": bundle.name})


def _fastest_reader(size: int) -> tuple[str, Callable[[], object]]:
    """The fastest of several ways to read `size` bytes of memory on one core with numpy, and its name."""
    words, floats = np.ones(size // 8, np.uint64), np.ones(size // 4, np.float32)
    ways: dict[str, Callable[[], object]] = {"max of uint64": words.max, "max of float32": floats.max}

    def once_ms(read: Callable[[], object]) -> float:
        return in_turns(read, lambda: None, 5, warm_up=1)[0][2]

    name = min(ways, key=lambda way: once_ms(ways[way]))
    return name, ways[name]


def _loaded_bytes(bundle: Path, manifest: Manifest, prepacked: Path | None) -> int:
    """Anonymous memory in bytes of the expert after it was loaded and run, measured in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_load_and_look, (bundle, manifest, prepacked))


def _load_and_look(bundle: Path, manifest: Manifest, prepacked: Path | None) -> int:
    x = probe_input(manifest.dims.hidden)
    # The first session includes the library's own memory, so measure the second.
    ExpertRuntime(bundle, manifest, [ID], prepacked=prepacked).run(ID, x)
    return_freed_memory()
    before = anonymous_bytes()
    runtime = ExpertRuntime(bundle, manifest, [ID], prepacked=prepacked)
    runtime.run(ID, x)
    return_freed_memory()
    return anonymous_bytes() - before


def anonymous_bytes() -> int:
    """Memory of this process that no file backs, in bytes; 0 if the system does not report it."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def _parts_ms(model: Path, x: np.ndarray) -> dict[str, float]:
    """Median time in ms of the graph's nodes: of each matrix, and of all other nodes together (`between`)."""
    with tempfile.TemporaryDirectory(prefix="wdmoe-bench-") as folder:
        options = expert_options()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = open_session(model, options)
        for _ in range(_PROFILED_RUNS):
            session.run(["y"], {"x": x})
        events = json.loads(Path(session.end_profiling()).read_text())
    by_node = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            by_node[event["name"].removesuffix("_kernel_time")].append(event["dur"] / 1e3)
    parts: dict[str, float] = defaultdict(float)
    for node, durations_ms in by_node.items():
        matrix = {"w1.out": "w1", "w3.out": "w3", "y": "w2"}.get(node, "between")
        parts[matrix] += statistics.median(durations_ms[1:])
    return dict(parts)
