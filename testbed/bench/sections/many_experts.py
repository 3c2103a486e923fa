"""Thousands of small experts, as in Qwen3-30B-A3B: export, manifest, start of a node with an eighth of them."""

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from common.files import atomic_write
from edge_node.experts import ExpertRuntime
from exporter.checkpoint.matrices import ExpertTensors
from exporter.expert.expert import ExpertJob, expert_paths, export_expert
from exporter.expert.graph import plan_layout
from testbed.bench.random_experts import QWEN3_30B as DIMS
from testbed.bench.random_experts import manifest_of, random_weights
from testbed.bench.rows import Row, Settings, in_turns
from testbed.bench.sections.experts import anonymous_bytes
from wire.experts import ExpertId
from wire.manifest import ExpertEntry, FileEntry, Manifest, Quantisation, decode_manifest, verify_file

HELD = 16
"""Experts of each layer that the node holds."""
_QUANTISATION = Quantisation(scheme="int4", block=32)
_COMPARED = 100


def measure(settings: Settings) -> Iterator[Row]:
    """Yield a row for each of export, manifest and start. It takes 300 MB on the disk and 3.2 GB of RAM."""
    with tempfile.TemporaryDirectory(prefix="wdmoe-bench-") as name:
        folder = Path(name)
        with settings.console.status("experts of 2048 × 768"):
            weights = random_weights(folder, DIMS)
        entries, row = _export(folder, weights)
        yield row
        manifest = manifest_of(_all_experts(folder, entries), DIMS, _QUANTISATION)
        yield _manifest(settings, manifest)
        with settings.console.status(f"a node with {DIMS.layers * HELD} experts"):
            yield _start(folder, manifest)


def _export(folder: Path, weights: ExpertTensors) -> tuple[list[ExpertEntry], Row]:
    """Entries of `HELD` exported experts of layer 0, and the row of their export."""
    entries: list[ExpertEntry] = []
    source, size = weights.w1.tensor.file, plan_layout(DIMS, _QUANTISATION).bytes

    def export() -> None:
        id = ExpertId(0, len(entries))
        entries.append(export_expert(ExpertJob(id, weights, DIMS, _QUANTISATION, folder)))

    def copy() -> None:
        hashlib.sha256(source.read_bytes())
        for content in (bytes(size), b"graph"):
            with atomic_write(folder / "copy") as file:
                file.write(content)

    ours, floor = in_turns(export, copy, HELD - 1, warm_up=1)
    name = "export of an expert of 2048 × 768, int4 b32, one process"
    parameters = {"file_bytes": entries[0].bytes, "source_bytes": weights.bytes}
    return entries, Row(name, "hashing its source, writing and syncing its files", ours, floor, None, parameters)


def _all_experts(folder: Path, entries: list[ExpertEntry]) -> list[ExpertEntry]:
    """Entries of all experts; those that the node holds have files, which are links to those of layer 0."""
    found = []
    for layer in range(DIMS.layers):
        for expert in range(DIMS.experts):
            entry = entries[expert % HELD]
            files = []
            for path, file in zip(expert_paths(ExpertId(layer, expert)), entry.files, strict=True):
                files.append(FileEntry(path=path, bytes=file.bytes, sha256=file.sha256))
                if layer and expert < HELD:
                    (folder / path).parent.mkdir(exist_ok=True)
                    os.link(folder / file.path, folder / path)
            found.append(msgspec.structs.replace(entry, layer=layer, expert=expert, files=tuple(files)))
    return found


def _manifest(settings: Settings, manifest: Manifest) -> Row:
    raw = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    ours, floor = in_turns(
        lambda: decode_manifest(raw, Path()), lambda: hashlib.sha256(raw), max(10, settings.samples // 10), warm_up=2
    )
    parameters = {"bytes": len(raw), "experts": len(manifest.experts)}
    return Row(f"reading a manifest of {len(manifest.experts)} experts", "hashing it", ours, floor, None, parameters)


def _start(bundle: Path, manifest: Manifest) -> Row:
    """Verify, load and prove one expert after another, as a node does at its start."""
    held = [entry for entry in manifest.experts if entry.expert < HELD]
    # The first one includes the library's own memory.
    runtime = ExpertRuntime(bundle, manifest, [held[0].id], threads=1)
    before = anonymous_bytes()
    ours: list[float] = []
    floor: list[float] = []
    for entry in held[1:]:
        began = time.perf_counter_ns()
        for file in entry.files:
            verify_file(bundle, file)
        verified = time.perf_counter_ns()
        runtime.add(entry.id)
        floor.append((verified - began) / 1e6)
        ours.append((time.perf_counter_ns() - verified) / 1e6)
    parameters = {
        "experts": len(held),
        "anonymous_bytes_per_expert": (anonymous_bytes() - before) // len(ours),
        "file_bytes": held[0].bytes,
        "mappings": Path("/proc/self/maps").read_text().count("\n"),
        f"median_ms_of_first_{_COMPARED}": float(np.median(ours[:_COMPARED])),
        f"median_ms_of_last_{_COMPARED}": float(np.median(ours[-_COMPARED:])),
    }
    return Row(
        f"start of a node with {len(held)} experts, per expert", "hashing its files", ours, floor, None, parameters
    )
