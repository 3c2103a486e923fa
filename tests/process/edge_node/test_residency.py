"""More experts than fit in memory, in processes of their own: memory stays within the budget."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from edge_node.experts.memory import largest, needed_bytes
from testbed.local_nodes import LocalNodes
from tests.waiting import wait_until
from wire.manifest import Scheme, load_manifest
from wire.status import decode_status
from wire.topics import Topics
from wire.transports import connect

Bundle = Callable[[Scheme], Path]


_SERVE = """
import json, resource, sys
from pathlib import Path
import numpy as np, psutil
from edge_node.experts.runtime import ExpertRuntime
from wire.manifest import load_manifest
bundle, most_loaded, requests, limit = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
manifest = load_manifest(bundle)
ids = [entry.id for entry in manifest.experts]
x = np.ones((1, manifest.dims.hidden), np.float32)
ExpertRuntime(bundle, manifest, ids[:1]).run(ids[0], x)  # the library's own share comes first
process = psutil.Process()
before = process.memory_info()
resource.setrlimit(resource.RLIMIT_AS, (before.vms + limit, before.vms + limit))
runtime = ExpertRuntime(bundle, manifest, ids, most_loaded=most_loaded)
rng = np.random.default_rng(0)
share = 1 / np.arange(1, len(ids) + 1) ** 2.0
chosen = rng.choice(len(ids), requests, p=share / share.sum())
rss = []
for i, k in enumerate(chosen):
    runtime.run(ids[k], x)
    if i % 50 == 0:
        rss.append(process.memory_info().rss - before.rss)
print(json.dumps({"rss": rss, "loads": runtime.loads.count}))
"""


def test_memory_does_not_grow_with_requests(tiny_bundle: Bundle) -> None:
    """Under a limit of the kernel that all experts at once break; every request is answered."""
    bundle = tiny_bundle("fp32")
    entries = load_manifest(bundle).experts
    budget = needed_bytes(largest(entries, 4), "fp32")
    limit = budget + (32 << 20)
    assert limit < needed_bytes(entries, "fp32") / 2

    def serve(most_loaded: int, requests: int) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-c", _SERVE, str(bundle), str(most_loaded), str(requests), str(limit)]
        # The limit counts addresses; glibc reserves 64 MiB of them for every thread, and here shall not.
        malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "262144"}
        env = {**os.environ, **malloc}
        return subprocess.run(argv, capture_output=True, text=True, check=False, env=env)

    assert serve(len(entries), 1).returncode != 0
    done = serve(4, 600)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["loads"] > 60
    assert max(told["rss"]) < budget
    assert max(told["rss"][6:]) - max(told["rss"][:6]) < 4 << 20


@pytest.mark.parametrize("fleet", ["int4"], indirect=True)
def test_the_status_lists_the_experts_in_memory(fleet: LocalNodes) -> None:
    entries = load_manifest(fleet.bundle).experts
    budget = needed_bytes(largest(entries, 5), "int4")
    options = ["--residency", "lru", "--memory-budget", str(budget)]
    fleet.start("small", "L*:E*", options=options)
    with closing(connect(fleet.address, "test-look")) as transport:
        transport.subscribe(Topics(fleet.cluster).status("small"), qos=1)
        message = wait_until(lambda: transport.receive(0.5), "a status", poll_s=0)
    assert message is not None
    status = decode_status(message.payload, "small")
    assert len(status.unit_ids()) == len(entries)
    assert status.residency is not None
    assert status.residency.most_loaded == 5
    assert status.holding is not None
    assert status.holding.resident_bytes <= budget
