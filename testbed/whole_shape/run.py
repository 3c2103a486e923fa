"""Prepares, measures and continues after an interruption: each finished arm leaves a line with all its samples."""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import torch

from common.cpu_idle import cpu_idle_disabled
from common.files import append_all, atomic_write
from common.jsonl import drop_cut_line
from testbed import facts
from testbed.bench.fleet_parts import measure_parts
from testbed.node_shares import choose_cores, read_siblings
from testbed.twin.bundle import write_twin_bundle
from testbed.twin.shapes import TwinName, kept_layers
from testbed.whole_shape.alone import trunk_by_drafts, trunk_by_sequences
from testbed.whole_shape.arms import (
    LINKS,
    Alone,
    Arm,
    ArmResult,
    arms_of,
    even_routing,
    predicted_ms,
    read_results,
    table,
)
from testbed.whole_shape.fleet import running
from testbed.whole_shape.measure import Decoder

RESULTS = "samples.jsonl"
TABLE = "table.md"
_SCHEMA = 1


def run_whole_shape(
    name: TwinName, out: Path, scratch: Path, *, layers: int | None, nodes: int, slices: Sequence[int], steps: int,
    jobs: int, device: str | None, on_progress: Callable[[str], None],
) -> None:  # fmt: skip
    """Measure all arms that `out` lacks.

    Args:
        out: results.
        scratch: for the bundle, of which there is one number of slices at a time.
        layers: of the model; None for all.
        nodes: node processes.
        slices: numbers of slices, in this order.
        steps: measured steps per arm.
        jobs: processes that write the bundle.
        device: of the trunk; None for a GPU if there is one.

    Raises:
        StorageError: the bundle does not fit, or can't be written.
        WdmoeError: a part of the fleet does not come up or fails.
        ValueError: the model does not have so many layers, or its experts can't be cut into that many slices.
    """
    out.mkdir(parents=True, exist_ok=True)
    log = out / RESULTS
    log.touch()
    drop_cut_line(log)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kept = kept_layers(name, layers)
    with cpu_idle_disabled():
        for count in slices:
            done = read_results(log)
            missing = [arm for arm in arms_of(name, kept, nodes, count) if arm not in done]
            if missing:
                _measure(name, kept, nodes, count, missing, out, scratch, steps, jobs, device, on_progress)
            else:
                on_progress(f"{count} slices: already measured")
            write_table(out)


def write_table(out: Path) -> None:
    """Write the table of all results so far."""
    results = sorted(read_results(out / RESULTS).values(), key=lambda r: msgspec.structs.astuple(r.arm))
    with atomic_write(out / TABLE) as file:
        file.write(("\n".join(table(results)) + "\n").encode())


def _measure(
    name: TwinName, layers: int, nodes: int, slices: int, arms: Sequence[Arm], out: Path, scratch: Path, steps: int,
    jobs: int, device: str, on_progress: Callable[[str], None],
) -> None:  # fmt: skip
    began = time.monotonic()

    def passed() -> str:
        return f"{time.monotonic() - began:.0f} s"

    def drawn(done: int, every: int) -> None:
        if done == every or done % max(1, every // 8) == 0:
            on_progress(f"{slices} slices: {done} of {every} experts written, {passed()}")

    manifest = write_twin_bundle(scratch, name, layers=layers, slices=slices, seed=0, jobs=jobs, progress=drawn)
    prepared_s = time.monotonic() - began
    cores = choose_cores(read_siblings(), nodes)
    with running(scratch, manifest, out / "logs", cores, device) as fleet:
        started_s = time.monotonic() - began - prepared_s
        trunk = fleet.station.model.trunk
        fleet.set_links(msgspec.structs.replace(arms[0], mbps=LINKS[0][0], rtt_ms=LINKS[0][1], shared_air=False))
        parts = measure_parts(fleet.station.dispatcher, manifest.dims, fleet.idle_links(LINKS[0][0]))
        alone = Alone(trunk_by_sequences(trunk), trunk_by_drafts(trunk), parts)
        decoder = Decoder(fleet.station.model)
        recorded = decoder.routing(manifest.dims.top_k)
        routing = even_routing(manifest, recorded)
        on_progress(f"{slices} slices: fleet ready, {passed()}; trunk {alone.trunk_ms}, unit {parts.unit_ms}")
        session = {
            **facts.result_header(_SCHEMA),
            "model": name, "layers": layers, "nodes": nodes, "slices": slices, "device": device,
            "gpu": torch.cuda.get_device_name() if device != "cpu" else "",
            "cores": {"station": list(cores.station), "nodes": list(cores.nodes)},
            "expert_bytes": sum(entry.bytes for entry in manifest.experts),
            "prepared_s": prepared_s, "started_s": started_s,
            "alone": msgspec.to_builtins(alone),
            "routing": {rows: experts.tolist() for rows, experts in recorded.items()},
        }  # fmt: skip
        with atomic_write(out / f"session-{time.strftime('%Y%m%d-%H%M%S')}.json") as file:
            file.write(json.dumps(session, indent=1).encode())
        links, idle_ms = "", dict[str, float]()
        fd = os.open(out / RESULTS, os.O_WRONLY | os.O_APPEND)
        try:
            for arm in arms:
                if arm.profile != links:
                    fleet.set_links(arm)
                    links = arm.profile
                    idle_ms = {node: 1e3 * link.rtt_s for node, link in fleet.idle_links(arm.mbps).items()}
                predicted = predicted_ms(arm, manifest, alone, idle_ms, routing)
                rows = tuple(decoder.steps(arm, steps))
                result = ArmResult(arm, rows, predicted, alone, idle_ms, int(time.time()))
                append_all(fd, msgspec.json.encode(result) + b"\n")
                on_progress(
                    f"{arm}: {result.token_ms:.1f} ms per token, {result.predicted_ms:.1f} predicted, {passed()}"
                )
        finally:
            os.close(fd)
