"""More experts than fit in memory: all are served, few are kept, memory stays where it is."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bs_coordinator.links import LinkMonitor, LinkSample
from edge_node.experts.memory import fitting, largest, needed_bytes
from edge_node.experts.runtime import ExpertRuntime
from edge_node.node_status import residency_status
from edge_node.worker import Worker
from wire import frames
from wire.errors import BundleError
from wire.experts import ExpertId
from wire.frames import ErrorFrame, ExpertRows, RequestId, ResultFrame, Status, WorkFrame
from wire.manifest import Scheme, load_manifest
from wire.probe import probe_input
from wire.tensors import WireDtype

Bundle = Callable[[Scheme], Path]


def _ask(worker: Worker, id: ExpertId) -> frames.Frame:
    x = probe_input(576, 2)
    slices = [ExpertRows(id.expert, np.arange(2, dtype=np.uint32), np.ones(2, np.float32))]
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
    assert cold.durations.load_ns > 0
    assert warm.durations.load_ns == 0
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
