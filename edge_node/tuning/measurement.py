"""Measures one quantisation with one number of threads on this device.

Each measurement is a process of its own: onnxruntime's thread pool can't be changed within a process, and a kernel that
this processor can't run ends only the measurement.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from common.console import run as run_console
from common.jsonl import decode_json
from edge_node.experts.providers import first_that_proves
from edge_node.experts.runtime import BATCH_ROWS, ExpertRuntime
from edge_node.tuning.tuning_file import TuningMeasurement
from wire.device_profiles import Provider
from wire.experts import UnitId, format_selector, parse_selector
from wire.manifest import ExpertEntry, Manifest, load_manifest
from wire.probe import probe_error, probe_input
from wire.tensors import Array

_SPREAD_BYTES = 64 << 20
_MOST_EXPERTS = 32
"""Experts are measured in turn, as tokens reach them. They are so many that no processor's cache holds all of them."""
_LEAST_S, _MOST_S, _LEAST_CALLS = 0.5, 4.0, 48
TIMEOUT_S = 300.0


def sample(entries: Sequence[ExpertEntry]) -> list[ExpertEntry]:
    """Experts to measure, spread evenly over those that the device will hold."""
    size = max(1, max(entry.bytes for entry in entries))
    count = min(len(entries), _MOST_EXPERTS, max(2, -(-_SPREAD_BYTES // size)))
    return [entries[k * len(entries) // count] for k in range(count)]


def measure(
    bundle: Path, manifest: Manifest, ids: Sequence[UnitId], threads: int, providers: Sequence[Provider]
) -> TuningMeasurement:
    """Measure in this process, with the first provider that works.

    Args:
        bundle, manifest: the bundle and its manifest.
        ids: experts to measure.
        threads: number of threads to compute with.
        providers: to be tried in this order.

    Raises:
        BundleError, ProbeError: these experts can't be used on this device.
    """
    runtime, chosen = first_that_proves(
        providers, lambda provider: ExpertRuntime(bundle, manifest, ids, threads=threads, provider=provider)
    )
    hidden = manifest.dims.hidden
    entries = manifest.entries(ids)
    x = probe_input(hidden, BATCH_ROWS)
    deviation = 0.0
    for entry in entries:
        deviation = max(deviation, probe_error(entry.probe_output, runtime.run(entry.id, x[:1])[0]))
    return TuningMeasurement(
        quantisation=str(manifest.quantisation),
        threads=threads,
        provider=chosen.provider,
        experts=len(ids),
        token_ms=(_median_ms(runtime, x[:1]),),
        batch_ms=(_median_ms(runtime, x),),
        error=statistics.fmean(entry.error for entry in entries),
        deviation=deviation,
        same_in_batch=all(runtime.batch_invariant(id) for id in ids),
    )


def measure_apart(
    bundle: Path, manifest: Manifest, ids: Sequence[UnitId], threads: int, providers: Sequence[Provider]
) -> TuningMeasurement:
    """Measure in a process of its own. If that fails, the measurement says why in `refused`."""
    command = [
        sys.executable,
        "-m",
        "edge_node.tuning.measurement",
        str(bundle),
        format_selector(ids, manifest.dims.slices),
        str(threads),
        *providers,
    ]
    quantisation = str(manifest.quantisation)
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return TuningMeasurement(
            quantisation=quantisation, threads=threads, refused=f"took longer than {TIMEOUT_S:.0f} s"
        )
    if done.returncode == 0:
        return decode_json(done.stdout, TuningMeasurement)
    if done.returncode < 0:
        refused = f"ended by signal {-done.returncode}"
    else:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no output"]
        refused = lines[-1].rpartition("error: ")[2]
    return TuningMeasurement(quantisation=quantisation, threads=threads, refused=refused)


def _median_ms(runtime: ExpertRuntime, x: Array) -> float:
    for id in runtime.ids:
        runtime.run(id, x)
    samples_ms: list[float] = []
    began = time.perf_counter()
    while True:
        for id in runtime.ids:
            start_ns = time.perf_counter_ns()
            runtime.run(id, x)
            samples_ms.append((time.perf_counter_ns() - start_ns) / 1e6)
        spent_s = time.perf_counter() - began
        if spent_s > _MOST_S or (spent_s > _LEAST_S and len(samples_ms) >= _LEAST_CALLS):
            return statistics.median(samples_ms)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("experts")
@click.argument("threads", type=int)
@click.argument("providers", nargs=-1)
def _command(bundle: Path, experts: str, threads: int, providers: tuple[Provider, ...]) -> None:
    """Print one measurement as JSON."""
    manifest = load_manifest(bundle)
    dims = manifest.dims
    ids = parse_selector(experts, layers=dims.layers, experts=dims.experts, slices=dims.slices)
    sys.stdout.buffer.write(msgspec.json.encode(measure(bundle, manifest, ids, threads, providers)))


if __name__ == "__main__":
    run_console(_command, "measurement", extra="edge")
