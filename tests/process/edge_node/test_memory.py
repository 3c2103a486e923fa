"""What is refused before loading against what loading really takes, in a process of its own."""

import json
import mmap
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_node.experts.memory import needed_bytes, use_huge_pages
from wire.manifest import Scheme, load_manifest

_LOAD = """
import gc, json, sys
from pathlib import Path
import numpy as np, psutil
from edge_node.experts.runtime import ExpertRuntime
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
    done = subprocess.run([sys.executable, "-c", _LOAD, bundle], capture_output=True, text=True, check=True)
    taken = json.loads(done.stdout)
    needed = needed_bytes(load_manifest(bundle).experts[1:], scheme)
    # From above, so that nothing dies later; within a factor of two, so that what fits is not refused. The
    # allocator's own slack is a few MiB whatever the size.
    assert taken <= needed <= 2 * taken + (8 << 20)


def _huge_bytes() -> int:
    """Anonymous memory of this process that is on huge pages."""
    found = re.search(r"^AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def test_large_blocks_move_to_huge_pages_and_holes_stay_empty() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[madvise]" not in setting.read_text():
        pytest.skip("huge pages are not to be asked for here")
    size, private = 32 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    content = bytes(range(256)) * (size // 256)
    use_huge_pages()  # whatever this process has already
    with mmap.mmap(-1, size, flags=private) as full, mmap.mmap(-1, size, flags=private) as sparse:
        # Neighbours would be one mapping.
        sparse.madvise(mmap.MADV_DONTFORK)
        full[:] = content
        sparse[: 1 << 20] = content[: 1 << 20]
        before = _huge_bytes()
        use_huge_pages()
        moved = _huge_bytes() - before
        assert full[:] == content
        if not moved:
            pytest.skip("this kernel has no MADV_COLLAPSE")
        assert size - (4 << 20) <= moved <= size
