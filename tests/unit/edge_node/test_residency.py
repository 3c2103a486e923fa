"""More experts than fit in memory: all are served, few are kept, memory stays where it is."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from bs_coordinator.links import LinkMonitor, LinkSample
from edge_node.agent import residency_status
from edge_node.experts.memory import fitting, largest, needed_bytes
from edge_node.experts.runtime import ExpertRuntime
from edge_node.worker import Worker
from testbed.local_nodes import LocalNodes
from wire import frames
from wire.errors import BundleError
from wire.experts import ExpertId
from wire.frames import ErrorFrame, ExpertSlice, RequestId, ResultFrame, Status, WorkFrame
from wire.manifest import Scheme, load_manifest, probe_input
from wire.status import decode_status
from wire.tensors import WireDtype
from wire.topics import Topics
from wire.transports import connect

Bundle = Callable[[Scheme], Path]


def _ask(worker: Worker, id: ExpertId) -> frames.Frame:
    x = probe_input(576, 2)
    slices = [ExpertSlice(id.expert, np.arange(2, dtype=np.uint32), np.ones(2, np.float32))]
    frame = WorkFrame(RequestId(1, 1), id.layer, 0, slices, x, WireDtype.FP32)
    reply = worker.answer(frames.encode(frame), time.perf_counter_ns())
    assert reply is not None
    return frames.decode(reply)


def test_answers_are_the_same_and_those_used_last_stay(tiny_bundle: Bundle, tmp_path: Path) -> None:
    bundle = tiny_bundle("int4")
    manifest = load_manifest(bundle)
    ids = [entry.id for entry in manifest.experts[:6]]
    everything = ExpertRuntime(bundle, manifest, ids)
    few = ExpertRuntime(bundle, manifest, ids, most_loaded=3, prepacked=tmp_path)
    assert few.ids == everything.ids
    assert few.loaded == tuple(ids[3:])
    x = probe_input(manifest.dims.hidden, 3)
    order = [0, 1, 0, 2, 0, 3, 4, 0, 5]
    for i in order:
        assert np.array_equal(few.run(ids[i], x), everything.run(ids[i], x))
    assert few.loaded == (ids[4], ids[0], ids[5])
    # 0, 1, 2, 3, 4 and 5 were loaded once each: 0 was used again before three others had been.
    assert (few.loads.count, few.loads.evictions) == (6, 6)
    said = residency_status(few)
    assert said is not None
    assert (said.most_loaded, said.loads, said.loaded) == (3, 6, "L0:E0,4-5")
    assert residency_status(everything) is None


def test_a_load_is_told_apart_from_computing(tiny_bundle: Bundle) -> None:
    bundle = tiny_bundle("fp32")
    ids = [ExpertId(0, 0), ExpertId(0, 1)]
    worker = Worker(ExpertRuntime(bundle, load_manifest(bundle), ids, most_loaded=1))
    cold, warm = _ask(worker, ids[0]), _ask(worker, ids[0])
    assert isinstance(cold, ResultFrame)
    assert isinstance(warm, ResultFrame)
    assert cold.durations.load_ns > 1e6
    assert warm.durations.load_ns == 0
    assert cold.durations.compute_ns < cold.durations.load_ns
    assert cold.durations.total_ns >= cold.durations.load_ns + cold.durations.compute_ns


def test_a_load_does_not_look_like_slow_computing() -> None:
    """A node that computes in 5 ms and in every other request reads an expert for 80 ms first."""
    links = LinkMonitor()

    def sample(i: int, load_s: float) -> LinkSample:
        node_s = 0.005 + load_s
        return LinkSample(0.1 * i, "a", 1200, 1200, 0.004 + node_s, node_s, experts=1, rows=1, load_s=load_s)

    for i in range(200):
        links.observe([sample(i, 0.08 * (i % 2))])
    (estimate,) = links.estimates(20.0)
    assert estimate.fixed_s + estimate.expert_s + estimate.row_s == pytest.approx(0.005, rel=0.1)
    # What to expect has the loads in it, as often as they come; patience is for the worst.
    predicted_s = links.predict_s("a", down_bytes=1200, up_bytes=1200, experts=1, rows=1)
    assert predicted_s == pytest.approx(0.004 + 0.005 + 0.04, rel=0.3)
    assert links.worst_load_s("a", experts=2) == pytest.approx(0.16, rel=0.1)
    for i in range(200, 1200):
        links.observe([sample(i, 0.0)])
    assert links.predict_s("a", down_bytes=1200, up_bytes=1200, experts=1, rows=1) == pytest.approx(0.009, rel=0.1)
    assert links.worst_load_s("a", experts=1) < 0.01


def test_an_expert_that_changed_on_disk_is_refused_and_others_are_served(tiny_bundle: Bundle, tmp_path: Path) -> None:
    bundle = tiny_bundle("int4")
    copy = tmp_path / "bundle"
    subprocess.run(["cp", "-r", bundle, copy], check=True)
    manifest = load_manifest(copy)
    ids = [ExpertId(0, 0), ExpertId(0, 1)]
    runtime = ExpertRuntime(copy, manifest, ids, most_loaded=1)
    weights = copy / manifest.entries(ids[:1])[0].files[1].path
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleError, match="does not match its SHA-256"):
        runtime.run(ids[0], probe_input(576))
    worker = Worker(runtime)
    refused = _ask(worker, ids[0])
    assert isinstance(refused, ErrorFrame)
    assert refused.status is Status.INTERNAL
    assert isinstance(_ask(worker, ids[1]), ResultFrame)


def test_what_fits_is_what_is_needed_at_most(tiny_bundle: Bundle) -> None:
    entries = load_manifest(tiny_bundle("int8")).experts
    for budget in np.linspace(0, 1.5 * needed_bytes(entries, "int8"), 50).astype(int).tolist():
        count = fitting(entries, "int8", budget)
        assert count == 0 or needed_bytes(largest(entries, count), "int8") <= budget
        if count < len(entries):
            assert needed_bytes(largest(entries, count + 1), "int8") > budget


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


def test_memory_stays_where_it_is(tiny_bundle: Bundle) -> None:
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
    done = serve(4, 2000)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["loads"] > 200
    assert max(told["rss"]) < budget
    assert max(told["rss"][20:]) - max(told["rss"][:20]) < 4 << 20


@pytest.mark.parametrize("fleet", ["int4"], indirect=True)
def test_a_node_says_what_it_keeps(fleet: LocalNodes) -> None:
    entries = load_manifest(fleet.bundle).experts
    budget = needed_bytes(largest(entries, 5), "int4")
    options = ["--residency", "lru", "--memory-budget", str(budget)]
    fleet.start("small", "L*:E*", options=options)
    with closing(connect(fleet.address, "test-look")) as transport:
        transport.subscribe(Topics(fleet.cluster).status("small"), qos=1)
        deadline = time.monotonic() + 60
        while (message := transport.receive(0.5)) is None:
            assert time.monotonic() < deadline
    status = decode_status(message.payload, "small")
    assert len(status.expert_ids()) == len(entries)
    assert status.residency is not None
    assert status.residency.most_loaded == 5
    assert status.holding is not None
    assert status.holding.resident_bytes <= budget
