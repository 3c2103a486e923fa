"""One token through experts, against reading as many bytes as their files hold."""

from collections.abc import Iterator

import numpy as np

from edge_node.runtime import ExpertRuntime
from testbed.bench.rows import Row, Settings, in_turns
from testbed.demo_assets import demo_bundle
from wire.manifest import Scheme, load_manifest, probe_input


def measure(settings: Settings) -> Iterator[Row]:
    """The demo model's experts, one layer after the other as tokens come: none is still in the cache."""
    schemes: tuple[Scheme, ...] = ("int4", "int8", "fp32")
    for scheme in schemes:
        bundle = demo_bundle(scheme, console=settings.console)
        manifest = load_manifest(bundle)
        entries = [entry for entry in manifest.experts if entry.expert == 0]
        runtime = ExpertRuntime(bundle, manifest, [entry.id for entry in entries], threads=1)
        x = probe_input(manifest.dims.hidden)
        weights = [np.ones(entry.bytes // 8, np.uint64) for entry in entries]

        def compute(runtime: ExpertRuntime = runtime, x: np.ndarray = x) -> None:
            for id in runtime.ids:
                runtime.run(id, x)

        def read(weights: list[np.ndarray] = weights) -> None:
            for array in weights:
                array.max()

        name = f"one token through {len(entries)} experts, {scheme}, one thread"
        ours, floor = in_turns(compute, read, max(10, settings.samples // 10))
        yield Row(name, "reading as many bytes", ours, floor, None, {"scheme": scheme, "bundle": bundle.name})
