"""What is refused before loading against what loading really takes, in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_node.memory import needed_bytes
from wire.manifest import Scheme, load_manifest

_LOAD = """
import gc, json, sys
from pathlib import Path
import numpy as np, psutil
from edge_node.runtime import ExpertRuntime
from wire.manifest import load_manifest
bundle = Path(sys.argv[1])
manifest = load_manifest(bundle)
first, *ids = [entry.id for entry in manifest.experts]
x = np.ones((1, manifest.dims.hidden), np.float32)
ExpertRuntime(bundle, manifest, [first]).run(first, x)  # the library's own share comes first
before = psutil.Process().memory_full_info().uss
runtime = ExpertRuntime(bundle, manifest, ids)
for id in ids:
    runtime.run(id, x)
gc.collect()
print(json.dumps(psutil.Process().memory_full_info().uss - before))
"""


@pytest.mark.parametrize("scheme", ["int4", "int8", "int8-dynamic", "fp16", "fp32"])
def test_estimate_covers_what_experts_take(tiny_bundle: Callable[[Scheme], Path], scheme: Scheme) -> None:
    bundle = tiny_bundle(scheme)
    done = subprocess.run([sys.executable, "-c", _LOAD, bundle], capture_output=True, text=True, check=True, timeout=60)
    taken = json.loads(done.stdout)
    needed = needed_bytes(load_manifest(bundle).experts[1:], scheme)
    # From above, so that nothing dies later; within a factor of two, so that what fits is not refused. The
    # allocator's own slack is a few MiB whatever the size.
    assert taken <= needed <= 2 * taken + (8 << 20)
